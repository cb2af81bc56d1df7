"""Throughput, latency and peak memory of whole networks; a time is told only of a network whose results are right."""

from __future__ import annotations

import copy
import csv
import io
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from replknet._errors import UsageError
from replknet.benchmark.model_runs import Call, Convolution, Execution, Format, How, Mode, build, call_of
from replknet.benchmark.timeline import Slice, timeline
from replknet.benchmark.timing import Timed
from replknet.layers import DepthwiseConv2d, reparameterize
from replknet.models.accelerate import accelerate

# Largest difference of the logits from the eager float32 network, relative to the largest logit.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}
# Length of the gradients' difference relative to their own length. Batch norm's statistics of few values amplify
# rounding; half precision is also allowed twice the error of torch's own eager network.
GRADIENT_TOLERANCE = {torch.float32: 2e-2, torch.float16: 5e-2, torch.bfloat16: 2e-1}
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
    formats: tuple[Format, ...]
    device: torch.device
    checkpointing: tuple[bool, ...] = (False,)
    size: tuple[int, int] | None = None
    """Height and width of the images; None: each network's own."""
    seconds: float = 1.0
    """Spent on one measurement."""
    timeline: bool = False
    """Also say where the time goes, kernel by kernel."""


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
    height: int
    width: int
    batch: int
    checkpointing: bool = False
    status: str = "ok"
    """ok, wrong (the results are, so no time is told), out of memory, failed."""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    samples: int = 0
    images_per_second: float | None = None
    peak_mib: float | None = None
    """Most memory that tensors took on the GPU during a call, weights included; empty on a CPU."""
    error: float | None = None
    """Largest difference of the outputs from the eager float32 network's, relative to the largest output."""
    gradient_error: float | None = None
    """Length of the difference of the gradients from the eager float32 network's, relative to their length."""
    note: str = ""
    timeline: tuple[Slice, ...] = ()
    """Where the time goes, if that was asked for."""


@dataclass(frozen=True)
class _Subject:
    """A network, its images, and what the eager float32 network makes of them."""

    name: str
    model: nn.Module
    images: Tensor
    want: dict[str, Tensor]
    failure: str = ""
    """Why the eager float32 network itself could not run."""


def measure_models(names: Iterable[str], settings: ModelSettings) -> Iterator[ModelRow]:
    """Rows as they come. Every network has random weights (seed 0) and sees the same images.

    Raises:
        UsageError: an unknown model, or a request that cannot be met anywhere.
    """
    if settings.device.type != "cuda" and any(execution.endswith("graph") for execution in settings.executions):
        raise UsageError(f"CUDA graphs need a CUDA GPU; the device is {settings.device}")
    for name, mode in itertools.product(names, settings.modes):
        torch.manual_seed(_SEED)
        model = build(name, mode)
        cfg: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
        channels, *default = cfg.get("input_size", (3, 224, 224))
        for batch in settings.batches:
            generator = torch.Generator().manual_seed(_SEED)
            images = torch.randn(batch, channels, *(settings.size or default), generator=generator)
            yield from _measure_batch(name, model, images.to(settings.device), mode, settings)


def _measure_batch(
    name: str, model: nn.Module, images: Tensor, mode: Mode, settings: ModelSettings
) -> Iterator[ModelRow]:
    subject = _subject(name, model, images, mode)
    ours = any(isinstance(module, DepthwiseConv2d) for module in model.modules())
    depthwise = ours or bool(accelerate(copy.deepcopy(model)).replaced)
    # A network without depthwise convolutions is the same with ours as with torch's.
    same: dict[str, Convolution] = {} if depthwise else {"replknet": "torch"}
    convolutions: list[Convolution] = list(dict.fromkeys([same.get(name, name) for name in settings.convolutions]))
    for merged in settings.merged if mode != "training" else (False,):
        if merged and not _can_merge(model):
            continue
        for convolution, dtype, format_, checkpointing, execution in itertools.product(
            convolutions, settings.dtypes, settings.formats, settings.checkpointing, settings.executions
        ):
            if format_ == "cnhw" and convolution != "optimize":
                continue
            how = How(mode, merged, convolution, execution, dtype, format_, checkpointing)
            yield _measure(subject, how, settings)


def _subject(name: str, model: nn.Module, images: Tensor, mode: Mode) -> _Subject:
    try:
        return _Subject(name, model, images, _reference(model, images, mode))
    except Exception as problem:  # noqa: BLE001 - models raise what they like, batch norm of one value for example
        return _Subject(name, model, images, {}, _first_line(problem))


def _can_merge(model: nn.Module) -> bool:
    before = sum(1 for _ in model.modules())
    return sum(1 for _ in reparameterize(copy.deepcopy(model).eval()).modules()) != before


def _reference(model: nn.Module, images: Tensor, mode: Mode) -> dict[str, Tensor]:
    """Results of the eager float32 network with torch's own convolutions, a few images at a time where that is free."""
    how = How(mode, False, "torch", "eager", torch.float32, "contiguous")
    if mode == "training":  # batch statistics need the whole batch
        return _results(call_of(model, how, images))
    parts = [_results(call_of(model, how, part)) for part in images.split(8)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _results(call: Call) -> dict[str, Tensor]:
    call.run()
    # Off the GPU, whose peak memory is measured.
    return {name: value.detach().float().clone().cpu() for name, value in call.results().items()}


def _measure(subject: _Subject, how: How, settings: ModelSettings) -> ModelRow:
    row, device = _row(subject, how), subject.images.device
    if subject.failure:
        return replace(row, status="failed", note=subject.failure)
    try:
        call = call_of(subject.model, how, subject.images)
        row = _checked(row, subject, how, _results(call))
        if row.status == "ok":
            row = _timed(row, call, device, how, settings)
        if row.status == "ok" and settings.timeline:
            row = replace(row, timeline=tuple(timeline(call.run, device)))
    except torch.OutOfMemoryError:
        return replace(row, status="out of memory")
    except Exception as problem:  # noqa: BLE001 - compilers raise what they like
        # One combination that a backend or a compiler cannot do must not end a long series; its row says why.
        return replace(row, status="failed", note=_first_line(problem))
    finally:
        if how.compiled:
            torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return row


def _first_line(problem: Exception) -> str:
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    return lines[0][:160]


def _row(subject: _Subject, how: How) -> ModelRow:
    values = {**asdict(how), "dtype": str(how.dtype).removeprefix("torch.")}
    batch, _, height, width = subject.images.shape
    return ModelRow(model=subject.name, height=height, width=width, batch=batch, **values)


def _checked(row: ModelRow, subject: _Subject, how: How, got: dict[str, Tensor]) -> ModelRow:
    """The row with its errors, its status "wrong" where they are too large."""
    error, gradient_error = _errors(got, subject.want)
    row = replace(row, error=error, gradient_error=gradient_error)
    limit, gradient_limit = TOLERANCE[how.dtype], GRADIENT_TOLERANCE[how.dtype]
    if (error or 0) > limit or (gradient_error or 0) > gradient_limit:
        limit, gradient_limit = _limits(subject, how)
    if error is not None and not error <= limit:
        return replace(row, status="wrong", note=f"outputs more than {limit:.2g} off")
    if gradient_error is not None and not gradient_error <= gradient_limit:
        return replace(row, status="wrong", note=f"gradients more than {gradient_limit:.2g} off")
    return row


def _errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float | None, float | None]:
    outputs = [
        float((got[name] - exact).abs().max() / exact.abs().max().clamp(min=1e-12))
        for name, exact in want.items()
        if name != "gradients"
    ]
    error = max(outputs) if outputs else None
    if "gradients" not in want:
        return error, None
    exact = want["gradients"]
    return error, float((got["gradients"] - exact).norm() / exact.norm().clamp(min=1e-12))


def _limits(subject: _Subject, how: How) -> tuple[float, float]:
    """Allowed errors: constants, or twice what torch's own eager network makes where the network amplifies rounding."""
    limit, gradient_limit = TOLERANCE[how.dtype], GRADIENT_TOLERANCE[how.dtype]
    if how.mode in ("inference", "features"):
        return limit, gradient_limit
    # In float32, contiguous is the yardstick itself; the other format adds in another order.
    other: Format = "channels_last" if how.dtype == torch.float32 else "contiguous"
    plain = How(how.mode, False, "torch", "eager", how.dtype, other)
    error, gradient_error = _errors(_results(call_of(subject.model, plain, subject.images)), subject.want)
    return max(limit, 2 * (error or 0.0)), max(gradient_limit, 2 * (gradient_error or 0.0))


def _timed(row: ModelRow, call: Call, device: torch.device, how: How, settings: ModelSettings) -> ModelRow:
    call.run()
    peak = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        call.run()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    timed = Timed(call.run, device, graph=how.graph)
    if how.graph and timed.graph is None:
        return replace(row, status="failed", note="could not be captured into a CUDA graph")
    times = timed.times(settings.seconds)
    return replace(
        row,
        median_ms=times.median / 1e3,
        p20_ms=times.p20 / 1e3,
        p80_ms=times.p80 / 1e3,
        samples=times.samples,
        images_per_second=row.batch / times.median * 1e6,
        peak_mib=peak,
    )


def to_csv(rows: Iterable[ModelRow], head: str) -> str:
    """Rows as CSV under a comment line that says where they were measured; time-lines are left out."""
    names = [field.name for field in fields(ModelRow) if field.name != "timeline"]
    return _csv(names, ({name: getattr(row, name) for name in names} for row in rows), head)


def timelines_to_csv(rows: Iterable[ModelRow], head: str) -> str:
    """Where the time of every row goes: one line a kernel."""
    about = ("model", "mode", "convolution", "execution", "dtype", "format", "batch")
    names = [*about, *(field.name for field in fields(Slice))]
    lines = ({**{name: getattr(row, name) for name in about}, **asdict(part)} for row in rows for part in row.timeline)
    return _csv(names, lines, head)


def _csv(names: list[str], lines: Iterable[dict[str, Any]], head: str) -> str:
    file = io.StringIO()
    file.write(f"# {head}\n")
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in line.items()})
    return file.getvalue()
