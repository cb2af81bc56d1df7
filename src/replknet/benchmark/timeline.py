"""Where the time of a call goes: kernel by kernel on a GPU, operator by operator on a CPU, in categories."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# The first pattern found in a kernel's or operator's name decides. Compiled kernels come first: they carry the names of
# all operators that were fused into them.
_CATEGORIES = (
    ("matrix product", r"^triton_tem"),
    ("norm and reduction", r"^triton_(red|per)"),
    ("pointwise", r"^triton_poi"),
    ("depthwise", r"forward_nchw|forward_nhwc|weight_grad_(nchw|nhwc|sum)|replknet::"),
    ("optimizer", r"multi_tensor_apply|adam"),
    ("copy", r"memcpy|memset|copy_|nchwToNhwc|nhwcToNchw|aten::(contiguous|clone|to|_to_copy)"),
    ("convolution", r"conv|fprop|dgrad|wgrad"),
    ("norm and reduction", r"norm|reduce|bn_|aten::(mean|sum|var)"),
    ("matrix product", r"gemm|nvjet|cublas|aten::(addmm|mm|bmm|baddbmm|linear)"),
    ("pointwise", r"elementwise|aten::(relu|gelu|add|mul|clamp|threshold)"),
)


@dataclass(frozen=True)
class Slice:
    """One kernel's share of a call."""

    category: str
    kernel: str
    milliseconds: float
    count: int


def timeline(run: Callable[[], Tensor], device: torch.device, calls: int = 3) -> list[Slice]:
    """Shares of one call, largest first; "between kernels" is what the clock shows beyond their sum.

    Args:
        run: the call, warmed up.
        device: where it runs.
        calls: number of calls to average over.
    """
    cuda = device.type == "cuda"
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        _synchronize(device)
        total = (time.perf_counter() - start) * 1e3 / calls
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    slices = []
    for event in profiler.key_averages():
        if event.device_type != kind:
            continue
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        slices.append(Slice(category_of(event.key), event.key[:200], microseconds / 1e3 / calls, event.count // calls))
    slices.append(Slice("between kernels", "", max(0.0, total - sum(part.milliseconds for part in slices)), 0))
    return sorted((part for part in slices if part.milliseconds > 0), key=lambda part: -part.milliseconds)


def category_of(kernel: str) -> str:
    """The category of a kernel or operator, by its name."""
    for category, pattern in _CATEGORIES:
        if re.search(pattern, kernel, re.IGNORECASE):
            return category
    return "other"


def by_category(slices: Iterable[Slice]) -> list[tuple[str, float, int]]:
    """Category, milliseconds and number of kernels a call, largest first."""
    milliseconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for part in slices:
        milliseconds[part.category] += part.milliseconds  # type: ignore[assignment]
        counts[part.category] += part.count
    return [(category, value, counts[category]) for category, value in milliseconds.most_common()]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
