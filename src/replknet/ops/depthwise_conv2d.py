"""Stride-1 "same" depthwise convolution: the public contract."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from replknet.ops import _library
from replknet.ops._decided import decide, key_of, run_of
from replknet.ops._dispatch import BACKENDS, Backend
from replknet.ops._problem import as_format_of

Activation = Literal["relu"]
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Stride-1 "same" depthwise convolution.

    y[n,c,h,w] = bias[c] + sum_ij weight[c,0,i,j] * x[n,c,h+i-Kh//2,w+j-Kw//2], zeros outside the image.

    Inside `torch.export`, ONNX export and `torch.jit.trace` the call is recorded as torch's plain convolution, so that
    what is exported needs nothing of this package.

    Args:
        x: `[N, C, H, W]`, N >= 0, C, H, W >= 1; float16, bfloat16, float32 or float64. Contiguous, channels_last and
            CNHW (a view of a contiguous `[C, N, H, W]`) run as they are; other strides are made contiguous.
        weight: `[C, 1, Kh, Kw]`, Kh and Kw odd, of x's dtype (inside autocast of any dtype).
        bias: `[C]` of x's dtype, or None.
        activation: None, or "relu", which is applied in the same kernel.
        backend: "auto" chooses the fastest that can run each pass (`replknet.ops.explain` says which and why);
            "cuda" (this project's tensor-core kernels), "rearranged" (torch's forward convolution for every pass, in
            the format in which it is fastest) or "torch" (torch's own, untouched) run, or raise why they cannot.

    Returns:
        `[N, C, H, W]` in x's dtype (autocast's inside autocast) and x's memory format; accumulated in float32
        (float64 for float64). Differentiable to any order, deterministic with "cuda".

    Raises:
        ValueError: rank, channel, even-kernel, dtype or device mismatch; the message names both sides.
        NotImplementedError: the forced backend cannot run this call; the message says why.

    Source: Ding et al. 2022, arXiv:2203.06717, sec. 3 and appendix.
    """
    key = None if torch.compiler.is_compiling() else key_of("forward", x, weight, bias, activation, backend)
    if key is not None and (run := run_of(key)):
        return _like(x, run(x, weight, bias, activation))
    x, weight, bias = under_autocast(x, weight, bias)
    if recording_a_portable_graph():
        y = F.conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2), groups=weight.shape[0])
        return y.relu() if activation == "relu" else y
    check_arguments(x, weight, bias, activation, backend)
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if key is not None and (run := decide(key, "forward", tensors, (weight.shape[2], weight.shape[3]), backend)):
        return _like(x, run(x, weight, bias, activation))
    return _library.forward(x, weight, bias, activation, backend)


def _like(x: Tensor, y: Tensor) -> Tensor:
    return y if y.stride() == x.stride() else as_format_of(y, x)


# Asked once: torch.compile of torch 2.11 cannot look into the question.
_WITH_AUTOCAST = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "hpu")))


def under_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments in autocast's dtype where autocast is on; float64 is left alone, as torch's convolutions do."""
    kind = x.device.type
    if kind not in _WITH_AUTOCAST or not torch.is_autocast_enabled(kind):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)

    def cast(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() and value.dtype != torch.float64 else value

    return cast(x), cast(weight), None if bias is None else cast(bias)


def check_arguments(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, backend: str) -> None:
    """Raise ValueError that names both sides of the first thing that does not fit."""
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W], given {list(x.shape)}; one image needs x.unsqueeze(0)")
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[0] != x.shape[1]:
        raise ValueError(
            f"weight must be [C, 1, Kh, Kw] with x's C = {x.shape[1]}, given {list(weight.shape)} for x {list(x.shape)}"
        )
    kh, kw = weight.shape[2:]
    if kh % 2 == 0 or kw % 2 == 0:
        raise ValueError(
            f'kernel {kh}x{kw} is even: "same" padding needs odd sizes; replknet.layers.DepthwiseConv2d or '
            "torch.nn.functional.conv2d take even ones"
        )
    if x.shape[1] == 0 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"x must have C, H and W of at least 1, given {list(x.shape)}; only N may be 0")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [C] with C = {weight.shape[0]}, given {list(bias.shape)}")
    if activation not in (None, "relu"):
        raise ValueError(f'activation must be None or "relu", given {activation!r}')
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, given {backend!r}")
    _check_kinds(x, weight, "weight")
    if bias is not None:
        _check_kinds(x, bias, "bias")


def _check_kinds(x: Tensor, other: Tensor, name: str) -> None:
    if x.dtype not in _DTYPES:
        raise ValueError(f"x must be one of {', '.join(map(str, _DTYPES))}, given {x.dtype}")
    if x.dtype != other.dtype:
        raise ValueError(f"x is {x.dtype}, {name} is {other.dtype}; convert one, or call inside torch.autocast")
    if x.device != other.device:
        raise ValueError(f"x is on {x.device}, {name} is on {other.device}; move one of them")


def recording_a_portable_graph() -> bool:
    """Whether the call is being recorded by torch.export, torch.jit.trace, or an ONNX exporter, which uses either."""
    # Not torch.compiler.is_exporting(): inside torch.compile of torch 2.11 it is True.
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
