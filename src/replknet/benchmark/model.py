"""Throughput, latency and peak memory of whole networks; a time is told only of a network whose outputs are right."""

from __future__ import annotations

import copy
import csv
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from replknet._errors import UsageError
from replknet.benchmark.timing import Timed
from replknet.layers import DepthwiseConv2d, reparameterize
from replknet.models.factory import create_model

Mode = Literal["inference", "training"]
Execution = Literal["eager", "compile", "graph"]
Convolution = Literal["replknet", "torch"]
MODES: tuple[Mode, ...] = get_args(Mode)
EXECUTIONS: tuple[Execution, ...] = get_args(Execution)
CONVOLUTIONS: tuple[Convolution, ...] = get_args(Convolution)

# Largest difference of the logits from the eager float32 network, relative to the largest logit.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}
_SEED = 0


@dataclass(frozen=True)
class ModelSettings:
    """What is measured; everything is combined with everything."""

    batches: tuple[int, ...]
    modes: tuple[Mode, ...]
    executions: tuple[Execution, ...]
    convolutions: tuple[Convolution, ...]
    merged: tuple[bool, ...]
    dtypes: tuple[torch.dtype, ...]
    channels_last: tuple[bool, ...]
    device: torch.device
    size: int | None = None
    """Side of the images; None: each network's own."""
    seconds: float = 1.0
    """Spent on one measurement."""


@dataclass(frozen=True)
class ModelRow:
    """One measurement; times in milliseconds a batch, empty unless `status` is "ok"."""

    model: str
    mode: str
    merged: bool
    convolution: str
    execution: str
    dtype: str
    format: str
    size: int
    batch: int
    status: str
    """ok, wrong (the outputs are, so no time is told), out of memory, failed."""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    samples: int = 0
    images_per_second: float | None = None
    peak_mib: float | None = None
    """Most memory that tensors took on the GPU during a call, weights included; empty on a CPU."""
    error: float | None = None
    """Largest difference of the logits from the eager float32 network's, relative to the largest logit."""
    note: str = ""


def measure_models(names: Iterable[str], settings: ModelSettings) -> Iterator[ModelRow]:
    """Rows as they come. Every network has random weights (seed 0) and sees the same images.

    Raises:
        UsageError: an unknown model, or a request that cannot be met anywhere.
    """
    if "graph" in settings.executions and settings.device.type != "cuda":
        raise UsageError(f"CUDA graphs need a CUDA GPU; the device is {settings.device}")
    for name in names:
        torch.manual_seed(_SEED)
        model = create_model(name).to(settings.device)
        cfg: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
        chans, default = cfg.get("input_size", (3, 224, 224))[0], cfg.get("input_size", (3, 224, 224))[-1]
        size = settings.size or default
        for batch in settings.batches:
            images = torch.randn(batch, chans, size, size, generator=torch.Generator().manual_seed(_SEED))
            for mode in settings.modes:
                yield from _measure_batch(name, model, images.to(settings.device), mode, settings)


def _measure_batch(
    name: str, model: nn.Module, images: Tensor, mode: Mode, settings: ModelSettings
) -> Iterator[ModelRow]:
    want = _reference(model, images, mode)
    has_own = any(isinstance(module, DepthwiseConv2d) for module in model.modules())
    for merged in settings.merged if mode == "inference" else (False,):
        if merged and not _can_merge(model):
            continue
        for convolution in settings.convolutions if has_own else ("torch",):
            for dtype in settings.dtypes:
                for channels_last in settings.channels_last:
                    for execution in settings.executions:
                        row = ModelRow(
                            model=name,
                            mode=mode,
                            merged=merged,
                            convolution=convolution,
                            execution=execution,
                            dtype=str(dtype).removeprefix("torch."),
                            format="channels_last" if channels_last else "contiguous",
                            size=images.shape[-1],
                            batch=len(images),
                            status="ok",
                        )
                        yield _measure(row, model, images, want, dtype, settings)


def _can_merge(model: nn.Module) -> bool:
    before = sum(1 for _ in model.modules())
    return sum(1 for _ in reparameterize(copy.deepcopy(model).eval()).modules()) != before


@torch.no_grad()
def _reference(model: nn.Module, images: Tensor, mode: Mode) -> Tensor:
    """Logits of the eager float32 network with torch's own convolutions, in a few images at a time for inference."""
    network = _prepared(model, "torch", False, mode)
    if mode == "training":  # batch statistics need the whole batch
        return network(images)
    return torch.cat([network(part) for part in images.split(8)])


def _prepared(model: nn.Module, convolution: str, merged: bool, mode: str) -> nn.Module:
    network = copy.deepcopy(model).train(mode == "training")
    if merged:
        network = reparameterize(network)
    return _with_torchs_convolutions(network) if convolution == "torch" else network


def _with_torchs_convolutions(network: nn.Module) -> nn.Module:
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is DepthwiseConv2d:
                activation, child.activation = child.activation, None
                child.__class__ = nn.Conv2d  # type: ignore[assignment]
                if activation == "relu":
                    setattr(module, name, nn.Sequential(child, nn.ReLU()))
    return network


def _measure(
    row: ModelRow, model: nn.Module, images: Tensor, want: Tensor, dtype: torch.dtype, settings: ModelSettings
) -> ModelRow:
    cuda = images.device.type == "cuda"
    try:
        network = _prepared(model, row.convolution, row.merged, row.mode)
        run = _runner(network, row, images, dtype)
        got = run()
        error, limit = _error(got, want), _limit(row, model, images, want, dtype)
        if not error <= limit:
            return _with(row, status="wrong", error=error, note=f"more than {limit:.2g} off")
        del got
        run()
        if cuda:
            torch.cuda.synchronize(images.device)
            torch.cuda.reset_peak_memory_stats(images.device)
            run()
            torch.cuda.synchronize(images.device)
        peak = torch.cuda.max_memory_allocated(images.device) / 2**20 if cuda else None
        timed = Timed(run, images.device, graph=row.execution == "graph")
        if row.execution == "graph" and timed.graph is None:
            return _with(row, status="failed", error=error, note="could not be captured into a CUDA graph")
        times = timed.times(settings.seconds)
    except torch.OutOfMemoryError:
        return _with(row, status="out of memory")
    except (RuntimeError, NotImplementedError, AssertionError) as problem:
        # One combination that a backend cannot run must not end a long series; its row says why.
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        return _with(row, status="failed", note=lines[0][:160])
    finally:
        if cuda:
            torch.cuda.empty_cache()
    return _with(
        row,
        median_ms=times.median / 1e3,
        p20_ms=times.p20 / 1e3,
        p80_ms=times.p80 / 1e3,
        samples=times.samples,
        images_per_second=row.batch / times.median * 1e6,
        peak_mib=peak,
        error=error,
    )


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().float() - want).abs().max() / want.abs().max().clamp(min=1e-12))


def _limit(row: ModelRow, model: nn.Module, images: Tensor, want: Tensor, dtype: torch.dtype) -> float:
    """Allowed error: a constant, or twice what torch's own eager network makes where batch statistics amplify it."""
    if row.mode == "inference" or dtype == torch.float32:
        return TOLERANCE[dtype]
    plain = _with(row, execution="eager", convolution="torch", merged=False)
    naive = _runner(_prepared(model, "torch", False, row.mode), plain, images, dtype)()
    return max(TOLERANCE[dtype], 2 * _error(naive, want))


def _with(row: ModelRow, **changes: Any) -> ModelRow:
    return ModelRow(**{**asdict(row), **changes})


def _runner(network: nn.Module, row: ModelRow, images: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """One call: a forward pass, or a whole training step; returns logits."""
    layout = torch.channels_last if row.format == "channels_last" else torch.contiguous_format
    images = images.contiguous(memory_format=layout)
    network = network.to(memory_format=layout)  # type: ignore[call-overload]
    if row.mode == "inference":
        network, images = network.to(dtype), images.to(dtype)
        forward = torch.compile(network, dynamic=False) if row.execution == "compile" else network

        @torch.no_grad()
        def infer() -> Tensor:
            return forward(images)

        return infer
    return _training_step(network, row, images, dtype)


def _training_step(network: nn.Module, row: ModelRow, images: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    labels = torch.arange(len(images), device=images.device) % int(network.num_classes)  # type: ignore[arg-type]
    # A learning rate of zero leaves the weights, so that every repetition computes, and can be checked for, the same.
    zero = {"lr": 0.0, "weight_decay": 0.0, "capturable": images.device.type == "cuda"}
    optimizer = torch.optim.AdamW(network.parameters(), **zero)
    forward = torch.compile(network, dynamic=False) if row.execution == "compile" else network

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            logits = forward(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        return logits.detach()

    return step


def to_csv(rows: Iterable[ModelRow], head: str) -> str:
    """Rows as CSV under a comment line that says where they were measured."""
    file = io.StringIO()
    file.write(f"# {head}\n")
    writer = csv.DictWriter(file, [field.name for field in fields(ModelRow)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = asdict(row).items()
        writer.writerow({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in values})
    return file.getvalue()
