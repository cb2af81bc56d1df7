"""Which of torch's kernels computes a pass fastest on a CPU.

torch has two for depthwise convolutions, both oneDNN's: the convolution and the gradient to its input, each of which
computes the other's result when the weight is turned by 180 degrees; in two memory formats. Which is fastest depends on
the processor's instructions. Every threshold here is from minima of interleaved runs, torch 2.14.1, on one core and on
two with AVX-512, and on two with AVX2 alone.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from replknet.ops._problem import Pass, Problem

# Multiply-adds below which rearrangements cost more than they save.
_TOO_SMALL = 50_000


@dataclass(frozen=True)
class Form:
    """How torch is to compute a convolution.

    Attributes:
        channels_last: the format that it is given, else the contiguous one.
        gradient: torch's input gradient instead of its convolution.
        reason: why.
        width: columns that the weight is widened to by zeros; None for its own.
    """

    channels_last: bool
    gradient: bool
    reason: str
    width: int | None = None


# A weight gradient as convolutions of each image with its output gradient as the kernel, in strips of rows; or by
# torch's gradient kernel for each image; or by that for all images at once, as channels.
WeightGradWay = Literal["strips", "images", "channels"]


def default(pass_: Pass, problem: Problem) -> tuple[str, str]:
    """The backend for a pass, "torch" or "rearranged", and why."""
    exact = problem.dtype in (torch.float32, torch.float64)
    if exact and math.prod((*problem.x_shape, *problem.kernel)) < _TOO_SMALL:
        return "torch", "too small for anything but the overhead of a call to matter"
    near = tuple(reaching(k, size) for k, size in zip(problem.kernel, problem.x_shape[2:], strict=True))
    if 2 * near[0] * near[1] <= problem.kernel[0] * problem.kernel[1]:
        return "rearranged", f"only {near[0]}x{near[1]} taps reach the map"
    if near == (1, 1):
        return "rearranged", "a 1x1 depthwise convolution is a scaling"
    if pass_ == "weight_grad":
        return _weight_grad_default(problem)
    if not exact:
        return "rearranged", "half precision is faster computed in float32 on a CPU"
    form = form_of(pass_, problem)
    as_it_is = form.width is None and form.channels_last == problem.channels_last
    return "torch" if as_it_is and form.gradient == (pass_ == "input_grad") else "rearranged", form.reason


def reaching(kernel: int, size: int) -> int:
    """How many of the kernel's taps, its middle ones, touch a map of that size from at least one pixel."""
    return min(kernel, 2 * size - 1)


# Bytes of images that change their format or dtype at a time, for each thread. In such parts, which stay in the caches
# and need no new pages of memory, 64 images took 0.63 to 0.91 of the time of whole tensors (27x27 on 14² to 31x31 on
# 56²); 8 images, and 64 on 7², were level. Parts of 1 to 12 MiB differed by no more than the noise.
_PART = 4 << 20


def parts_of(shape: Sequence[int], dtype: torch.dtype) -> int:
    """In how many parts the images of x `[N, C, H, W]` go through a convolution that needs copies of them.

    Args:
        shape: of x.
        dtype: of the copies.

    Returns:
        1 to N, so that no part is less than an image; 0 without images.
    """
    images = math.prod(shape) * dtype.itemsize / (_PART * torch.get_num_threads())
    return min(shape[0], math.ceil(images))


@functools.lru_cache(maxsize=4096)
def form_of(pass_: Pass, problem: Problem) -> Form:
    """The fastest form of a forward pass or input gradient in float32 or float64."""
    if problem.dtype == torch.float64:
        return Form(False, pass_ == "input_grad", "float64 has one kernel on a CPU, for the contiguous format")
    rules = _with_avx512 if has_avx512() else _with_avx2
    return rules(pass_, problem)


@functools.cache
def has_avx512() -> bool:
    """Whether oneDNN's kernels for AVX-512 run here; taken to be so on processors that are not x86, unmeasured."""
    if platform.machine().lower() not in ("x86_64", "amd64", "x86"):
        return True
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


# ---- AVX-512. Contiguous kernels wider than this fall back to reference code, a hundred times slower.
_CONTIGUOUS_WIDTH_AVX512 = 13
# The channels_last kernel is another from a width of 15 on and up to twice as fast there as just below, so that columns
# of zeros pay for themselves. Which widths, and from how many outputs for each tap of the weight on, as the weight has
# to be copied: 13 gains 1.5 at 1.2 and loses 0.9 at 0.3, 11 gains 1.0 to 1.3 from 2 on and loses below.
FAST_WIDTH = 15
SLOW_WIDTHS = {11: 2, 13: 1}
# Below either, turning a float32 weight (8 us and more) costs what the faster convolution saves, on one core and on
# two: torch's gradient took 0.6 to 1.0 of the time for 49 and 98 outputs a channel under 9x9 to 15x15 (1.1 to 1.5 from
# 196 on), and 0.9 to 1.0 for 1 to 5 million multiply-adds (1.0 to 1.2 for 8 to 20 million).
_FEW_OUTPUTS = 128
_TOO_SMALL_TO_TURN = 6_000_000
# Columns of a channels_last weight, and the width of map from which torch's float32 gradient took 0.92 to 1.07 of the
# time of the convolution with the turned weight (1.03 to 1.6 on narrower maps).
_LEVEL_FROM_WIDTH = {9: 56, 11: 28}


def _with_avx512(pass_: Pass, problem: Problem) -> Form:
    return _forward_with_avx512(problem) if pass_ == "forward" else _input_grad_with_avx512(problem)


def _forward_with_avx512(problem: Problem) -> Form:
    n, _, h, w = problem.x_shape
    kw = problem.kernel[1]
    if problem.channels_last and kw in SLOW_WIDTHS:
        if n * h * w < SLOW_WIDTHS[kw] * math.prod(problem.kernel):
            return Form(True, False, "widening the weight costs more than it saves for so few outputs")
        return Form(True, False, f"a weight widened by zeros to {FAST_WIDTH} columns is faster", FAST_WIDTH)
    if problem.channels_last or kw <= _CONTIGUOUS_WIDTH_AVX512:
        return Form(problem.channels_last, False, "torch's kernel for this format is the fastest")
    return Form(True, False, "torch's contiguous kernel is slow for so wide a weight; its channels_last kernel is fast")


def _input_grad_with_avx512(problem: Problem) -> Form:
    n, c, h, w = problem.x_shape
    kh, kw = problem.kernel
    torchs = functools.partial(Form, problem.channels_last, True)
    if kw == 1 or kh * kw <= 11:
        return torchs("torch's gradient is the fastest for so small a weight")
    if n * h * w < _FEW_OUTPUTS or n * c * h * w * kh * kw < _TOO_SMALL_TO_TURN:
        return torchs("turning the weight costs more than it saves for so few outputs")
    if problem.channels_last and w >= _LEVEL_FROM_WIDTH.get(kw, w + 1):
        return torchs(f"torch's gradient of {kw} channels_last columns is as fast on so wide a map")
    few = kh * kw <= 153 or (kh <= 5 and h < 28)
    if few and kw > _CONTIGUOUS_WIDTH_AVX512 and not problem.channels_last:
        return torchs("changing the format costs more than the faster kernel saves")
    channels_last = problem.channels_last or kw > _CONTIGUOUS_WIDTH_AVX512
    width = FAST_WIDTH if channels_last and kw in SLOW_WIDTHS else None
    return Form(channels_last, False, "torch's forward convolution with the flipped weight beats its gradient", width)


# ---- AVX2. The contiguous convolution is the fastest up to this width and falls back to reference code beyond, ten to
# thirty times slower. torch's gradient has no such limit: against the channels_last convolution of a contiguous x it
# took 0.5 to 0.95 of the time for 11x11 to 51x51 on maps of 7 to 200 pixels a side.
_CONTIGUOUS_WIDTH_AVX2 = 9
# Taps and pixels of a map from which even a channels_last x gains from it, with copies: 1.1 to 1.4 for 31x31 on 56².
_MANY_TAPS, _LARGE_MAP = 400, 2000
# Images from which channels_last gradients of maps that are not large gain from being convolutions: 1.0 to 1.5, and 0.8
# to 1.0 for one image.
_SEVERAL_IMAGES = 4


def _with_avx2(pass_: Pass, problem: Problem) -> Form:
    n, _, h, w = problem.x_shape
    kh, kw = problem.kernel
    if problem.channels_last:
        if kh * kw >= _MANY_TAPS and h * w >= _LARGE_MAP and kw > _CONTIGUOUS_WIDTH_AVX2:
            return Form(False, True, "torch's gradient kernel for the contiguous format beats the others, with copies")
        gradient = pass_ == "input_grad" and (h * w >= _LARGE_MAP or n < _SEVERAL_IMAGES)
        return Form(True, gradient, "torch's kernel for this format is the fastest")
    if kw > _CONTIGUOUS_WIDTH_AVX2:
        return Form(False, True, "torch's gradient kernel is fast for so wide a weight, its convolution is slow")
    if pass_ == "input_grad" and kw == 1:
        return Form(False, True, "torch's gradient is the fastest for so small a weight")
    return Form(False, False, "torch's convolution is the fastest for so narrow a weight")


# ---- Weight gradients.
def _weight_grad_default(problem: Problem) -> tuple[str, str]:
    kh, kw = problem.kernel
    if problem.dtype == torch.float64:
        return "torch", "float64 has one kernel on a CPU"
    narrow = kw <= 3 and kh <= min(problem.x_shape[2], 21)
    if narrow and problem.dtype != torch.float16:
        return "torch", "torch has a gradient kernel for so narrow a weight"
    return "rearranged", "torch's weight gradient is slow for this weight; x under the output gradient is fast"


# Multiply-adds an image below which the overhead of a call for each image shows: 64,96,7²,7 took 1.2 ms in one call and
# 7 to 10 ms in 64.
_LITTLE_WORK = 2_000_000
# Contiguous images at once took 1.6 to 2.0 of the time of one by one for 5x5 and 7x7 on 56² and for 21x21 on 14², and
# 0.5 to 1.0 of it for up to 15x15 on 7² and 14².
_FEW_PIXELS, _FEW_TAPS = 196, 225
# Width of map up to which torch's gradient kernel beats strips: 0.6 to 0.9 of their time at 7 to 56, 1.4 to 1.8 at 193
# and 256.
_NARROW_MAP = 64


def weight_grad_way(
    shape: tuple[int, int, int, int], kernel: tuple[int, int], dtype: torch.dtype, *, channels_last: bool
) -> WeightGradWay:
    """The fastest rearrangement of a weight gradient.

    Args:
        shape: of x, `[N, C, H, W]`.
        kernel: `(Kh, Kw)`, no more than the taps that reach the map.
        dtype: that the sums are computed in.
        channels_last: whether x and the output gradient are.
    """
    n, c, h, w = shape
    kh, kw = kernel
    if has_avx512() or dtype != torch.float32 or w > _NARROW_MAP:
        return "strips"
    if channels_last:
        return "channels" if n > 1 and c * h * w * kh * kw < _LITTLE_WORK else "strips"
    return "channels" if h * w <= _FEW_PIXELS and kh * kw <= _FEW_TAPS else "images"
