"""Which backend runs a pass, and why: reasons against each, measured preferences, analytical defaults."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from replknet.ops import _cpu, _rearranged, _torch, _tuning
from replknet.ops._problem import Pass, Problem, dense, problem_of

Backend = Literal["auto", "cuda", "rearranged", "torch"]
BACKENDS: tuple[str, ...] = get_args(Backend)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Choice:
    """The backend that runs one pass, why it was chosen, and the tile of its kernel where tuning found a better one."""

    backend: str
    reason: str
    tile: str | None = None

    def __str__(self) -> str:
        tile = "" if self.tile is None else f" with tile {self.tile}"
        return f"{self.backend}{tile} ({self.reason})"


@dataclass(frozen=True)
class Explanation:
    """The choice for each of the three passes of one call."""

    forward: Choice
    input_grad: Choice
    weight_grad: Choice

    def __str__(self) -> str:
        return "\n".join(f"{field.name}: {getattr(self, field.name)}" for field in fields(self))


def can_run(backend: str, pass_: Pass, problem: Problem) -> str | None:
    """None where the backend can run the pass, else the reason why not."""
    if problem.dtype not in _DTYPES:
        return f"{problem.dtype} is not one of {', '.join(str(dtype) for dtype in _DTYPES)}"
    return can_run_cuda(pass_, problem) if backend == "cuda" else None


def can_run_cuda(pass_: Pass, problem: Problem) -> str | None:
    """None where this project's CUDA kernels can run the pass, else the reason why not."""
    if problem.device.type != "cuda":
        return f"the tensors are on {problem.device.type}, the kernels run on NVIDIA GPUs"
    if torch.version.hip is not None:
        return "this torch is built for ROCm, the kernels are written for NVIDIA GPUs"
    try:
        from replknet.ops import cuda
    except ImportError as error:
        return f"the compiler front end cannot be imported: {error}"
    return cuda.can_run(pass_, problem)


def tiles_of(backend: str, pass_: Pass, problem: Problem) -> tuple[str, ...]:
    """Names of the tiles, other than the default, that tuning measures; only this project's CUDA kernels have any."""
    return implementation("cuda").tiles(pass_, problem) if backend == "cuda" else ()


def compile_tiles(pass_: Pass, problem: Problem) -> None:
    """Compile the kernels of all tiles of the CUDA kernels at once."""
    implementation("cuda").compile_tiles(pass_, problem)


def choose(pass_: Pass, problem: Problem, backend: str = "auto") -> Choice:
    """The backend for one pass.

    Raises:
        NotImplementedError: a backend asked for by name cannot run the pass; the message says why.
    """
    return _choose(pass_, problem, backend, _tuning.enabled())


def implementation(name: str) -> ModuleType:
    """The module with `forward`, `input_grad` and `weight_grad` of a backend."""
    if name == "cuda":
        from replknet.ops import cuda

        return cuda
    return {"rearranged": _rearranged, "torch": _torch}[name]


def explain(x: Tensor, weight: Tensor, *, backend: Backend = "auto") -> Explanation:
    """Which backend `depthwise_conv2d(x, weight)` uses for each pass, and why; nothing is run.

    Args:
        x: `[N, C, H, W]`; only shape, strides, dtype and device are looked at.
        weight: `[C, 1, Kh, Kw]`.
        backend: as in `depthwise_conv2d`.

    Raises:
        ValueError, NotImplementedError: as `depthwise_conv2d`.
    """
    from replknet.ops.depthwise_conv2d import check_arguments, under_autocast

    x, weight, _ = under_autocast(x, weight, None)
    check_arguments(x, weight, None, None, backend)
    problem = problem_of(dense(x), (weight.shape[2], weight.shape[3]))
    return Explanation(*(choose(field.name, problem, backend) for field in fields(Explanation)))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4096)
def _choose(pass_: Pass, problem: Problem, backend: str, autotune: bool) -> Choice:
    if backend != "auto":
        if reason := can_run(backend, pass_, problem):
            raise NotImplementedError(
                f"backend {backend!r} cannot run the {pass_} pass of {_describe(problem)}: {reason}; "
                'backend="auto" chooses one that can'
            )
        return Choice(backend, "asked for by name")
    candidates = {name: can_run(name, pass_, problem) for name in BACKENDS[1:]}
    runnable = tuple(name for name, reason in candidates.items() if reason is None)
    if measured := _tuning.fastest(pass_, problem, runnable, measure=autotune):
        return Choice(measured.backend, f"measured: {measured}", measured.tile)
    if "cuda" in runnable:
        return _default_with_kernels(pass_, problem)
    without = f"no CUDA kernel: {candidates['cuda']}; " if problem.device.type == "cuda" else ""
    name, reason = _default_of_torch(pass_, problem)
    return Choice(name, without + reason)


def _default_with_kernels(pass_: Pass, problem: Problem) -> Choice:
    if problem.kernel == (1, 1):
        return Choice("rearranged", "a 1x1 depthwise convolution is a scaling")
    if reason := _faster_in_torch(pass_, problem):
        return Choice("torch", reason)
    from replknet.ops import cuda

    if problem.channels_last and not cuda.runs_natively(problem):
        return Choice("cuda", "tensor-core kernels, on contiguous copies: no channels_last kernel takes this call")
    return Choice("cuda", "this project's kernels for this shape, dtype and format")


def _faster_in_torch(pass_: Pass, problem: Problem) -> str | None:
    """Where torch was faster than our kernels on an H100, and by how much; None elsewhere."""
    n, _, h, w = problem.x_shape
    contiguous_half = not problem.channels_last and problem.dtype != torch.float32
    if pass_ == "forward" and contiguous_half and n * h * w * math.prod(problem.kernel) <= 49 * 169:
        return "one small map: 7.8 us in torch, 9.5 us in our kernels for 1,1024,7²,13"
    return None


def _default_of_torch(pass_: Pass, problem: Problem) -> tuple[str, str]:
    """The faster arrangement of torch's own kernels where ours cannot run."""
    if problem.device.type == "cpu":
        return _cpu.default(pass_, problem)
    if problem.device.type == "cuda" and max(problem.kernel) > 7:
        # H100: dgrad 14182 us as torch's gradient, 7926 us as its forward, for 64,128,56²,31 in float16.
        return "rearranged", "torch's gradients of large kernels are slower than its forward convolution"
    return "torch", f"torch's own kernels on {problem.device.type}"


def _describe(problem: Problem) -> str:
    kind = "channels_last" if problem.channels_last else "contiguous"
    shape, (kh, kw) = list(problem.x_shape), problem.kernel
    return f"x {shape} {kind} {str(problem.dtype).removeprefix('torch.')} on {problem.device}, kernel {kh}x{kw}"
