"""The ways to compute each pass that are measured side by side, and the oracle that each has to match."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from replknet.benchmark.suites import Case
from replknet.ops import Backend, _library, depthwise_conv2d, depthwise_conv2d_fft

PASSES = ("forward", "input_grad", "weight_grad")
# "replknet" is what the automatic choice runs; "replknet:NAME" is one backend by name.
METHODS = (
    "replknet",
    "torch_contiguous",
    "torch_channels_last",
    "torch_compile",
    "fft",
    "cutlass_example_19",
    "replknet:cuda",
    "replknet:rearranged",
    "replknet:torch",
)
DEFAULT_METHODS = {"cuda": METHODS[:6], "cpu": ("replknet", "torch_contiguous", "torch_channels_last", "fft")}


@dataclass(frozen=True)
class Tensors:
    """Inputs of one case: x and the output gradient `[N, C, H, W]` in one format, the weight `[C, 1, Kh, Kw]`."""

    x: Tensor
    grad_y: Tensor
    weight: Tensor

    def contiguous(self, memory_format: torch.memory_format) -> Tensors:
        """The same in another format."""
        x, grad_y = (value.contiguous(memory_format=memory_format) for value in (self.x, self.grad_y))
        return Tensors(x, grad_y, self.weight)


def draw(case: Case, dtype: torch.dtype, channels_last: bool, device: torch.device) -> Tensors:
    """Standard normal tensors, the weight scaled so that outputs are about 1."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    form = torch.channels_last if channels_last else torch.contiguous_format
    shape = (case.n, case.c, case.h, case.w)
    weight = normal(case.c, 1, case.kh, case.kw) / (case.kh * case.kw) ** 0.5
    return Tensors(normal(*shape), normal(*shape), weight).contiguous(form)


def prepare(method: str, pass_: str, tensors: Tensors) -> Callable[[], Tensor]:
    """The function to time.

    Raises:
        NotImplementedError: the method cannot run the pass; the message says why.
    """
    if method.startswith("replknet"):
        return _ours(pass_, tensors, cast(Backend, method.partition(":")[2] or "auto"))
    if method == "torch_contiguous":
        return _torch(pass_, tensors.contiguous(torch.contiguous_format))
    if method == "torch_channels_last":
        return _torch(pass_, tensors.contiguous(torch.channels_last))
    if method == "torch_compile":
        torch.compiler.reset()
        return torch.compile(_torch(pass_, tensors), dynamic=False)
    if method == "fft":
        return _fft(pass_, tensors)
    return _cutlass(pass_, tensors.contiguous(torch.contiguous_format))


def _ours(pass_: str, t: Tensors, backend: Backend) -> Callable[[], Tensor]:
    kh, kw = t.weight.shape[2:]
    return {
        "forward": lambda: depthwise_conv2d(t.x, t.weight, backend=backend),
        "input_grad": lambda: _library.input_grad(t.grad_y, t.weight, backend),
        "weight_grad": lambda: _library.weight_grad(t.grad_y, t.x, kh, kw, backend),
    }[pass_]


def _torch(pass_: str, t: Tensors) -> Callable[[], Tensor]:
    kh, kw = t.weight.shape[2:]
    padding, groups = [kh // 2, kw // 2], t.x.shape[1]
    if pass_ == "forward":
        return lambda: F.conv2d(t.x, t.weight, padding=tuple(padding), groups=groups)
    wanted = [pass_ == "input_grad", pass_ == "weight_grad", False]
    backward = torch.ops.aten.convolution_backward.default
    arguments = (t.grad_y, t.x, t.weight, None, [1, 1], padding, [1, 1], False, [0, 0], groups, wanted)
    return lambda: backward(*arguments)[wanted.index(True)]


def _fft(pass_: str, t: Tensors) -> Callable[[], Tensor]:
    dtype, (kh, kw) = t.x.dtype, t.weight.shape[2:]
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def image(x: Tensor, weight: Tensor) -> Tensor:
        return depthwise_conv2d_fft(x.to(wide), weight.to(wide)).to(dtype)

    return {
        "forward": lambda: image(t.x, t.weight),
        "input_grad": lambda: image(t.grad_y, t.weight.flip(2, 3)),
        "weight_grad": lambda: weight_grad_fft(t.grad_y.to(wide), t.x.to(wide), kh, kw).to(dtype),
    }[pass_]


def weight_grad_fft(grad_y: Tensor, x: Tensor, kh: int, kw: int) -> Tensor:
    """Gradient with respect to the weight, `[C, 1, Kh, Kw]`, by the correlation theorem."""
    size = (x.shape[2] + kh - 1, x.shape[3] + kw - 1)
    spectrum = (torch.fft.rfft2(grad_y, s=size).conj() * torch.fft.rfft2(x, s=size)).sum(0)
    shifts = torch.fft.irfft2(spectrum, s=size).roll((kh // 2, kw // 2), (1, 2))
    return shifts[:, None, :kh, :kw]


def _cutlass(pass_: str, t: Tensors) -> Callable[[], Tensor]:
    extension, kind = _cutlass_extension(), {torch.float16: "fp16", torch.float32: "fp32"}.get(t.x.dtype)
    if kind is None or t.x.device.type != "cuda":
        raise NotImplementedError(f"CUTLASS example 19 takes float16 and float32 on CUDA, not {t.x.dtype}")
    if t.weight.shape[2] != t.weight.shape[3]:
        raise NotImplementedError("measured for square kernels only")
    return {
        "forward": lambda: getattr(extension, f"forward_{kind}")(t.x, t.weight),
        "input_grad": lambda: getattr(extension, f"backward_data_{kind}")(t.grad_y, t.weight),
        "weight_grad": lambda: getattr(extension, f"backward_filter_{kind}")(t.grad_y, t.x, t.weight),
    }[pass_]


@functools.cache
def _cutlass_extension():
    import importlib

    try:
        return importlib.import_module("_depthwise_conv2d_implicit_gemm_C")
    except ImportError as error:
        raise NotImplementedError("CUTLASS example 19 is not built here") from error


# Largest |error| over largest |value|. Half precision may be accumulated in half precision by some method; TF32 rounds
# inputs to 11 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
TF32_TOLERANCE = 2e-3


class Oracle:
    """Float64 values on a slice of a case: first, middle and last channel; first and last image for image results."""

    def __init__(self, case: Case, tensors: Tensors, pass_: str) -> None:
        self.pass_ = pass_
        self.channels = sorted({0, case.c // 2, case.c - 1})
        self.images = sorted({0, case.n - 1})
        x, grad_y = (value[:, self.channels].double().contiguous() for value in (tensors.x, tensors.grad_y))
        weight = tensors.weight[self.channels].double()
        if pass_ == "weight_grad":
            self.exact = weight_grad_fft(grad_y, x, case.kh, case.kw)
        elif pass_ == "forward":
            self.exact = depthwise_conv2d_fft(x[self.images], weight)
        else:
            self.exact = depthwise_conv2d_fft(grad_y[self.images], weight.flip(2, 3))

    def error(self, got: Tensor) -> float:
        """Largest absolute error over the largest absolute value, infinite if anything at all is not finite."""
        if not got.isfinite().all():
            return float("inf")
        part = got[self.channels] if self.pass_ == "weight_grad" else got[self.images][:, self.channels]
        return ((part.double() - self.exact).abs().max() / self.exact.abs().max()).item()
