"""What a backend has to know about one call, and the memory formats in which it arrives.

Three formats run as they are: contiguous, channels_last, and CNHW, a view `[N, C, H, W]` of a contiguous
`[C, N, H, W]`, in which a 1x1 convolution is one matrix product and the statistics of a channel lie in one piece.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Pass = Literal["forward", "input_grad", "weight_grad"]
PASSES: tuple[Pass, ...] = ("forward", "input_grad", "weight_grad")


@dataclass(frozen=True)
class Problem:
    """Shapes, dtype, format and device of one depthwise convolution; hashable, so that decisions can be kept."""

    x_shape: tuple[int, int, int, int]
    kernel: tuple[int, int]
    dtype: torch.dtype
    channels_last: bool
    device: torch.device

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """`[C, 1, Kh, Kw]`."""
        return (self.x_shape[1], 1, *self.kernel)


def is_channels_last(x: Tensor) -> bool:
    """Whether x is channels_last and not also contiguous, as it is with one channel or with 1x1 maps."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def is_cnhw(x: Tensor) -> bool:
    """Whether x is a view of a contiguous `[C, N, H, W]` and not also contiguous, as it is with one image."""
    return x.dim() == 4 and not x.is_contiguous() and x.transpose(0, 1).is_contiguous()


def dense(x: Tensor) -> Tensor:
    """x itself in one of the three formats, else a contiguous copy."""
    return x if x.is_contiguous() or is_channels_last(x) or is_cnhw(x) else x.contiguous()


def in_format_of(value: Tensor, like: Tensor) -> Tensor:
    """The value in the format of a dense tensor; a copy only where it is in another."""
    if is_cnhw(like):
        return value.transpose(0, 1).contiguous().transpose(0, 1)
    return value.contiguous(memory_format=torch.channels_last if is_channels_last(like) else torch.contiguous_format)


def dense_strides(like: Tensor) -> tuple[int, int, int, int]:
    """The strides, those of size-1 dimensions included, of a result in the format of a dense tensor.

    The fake kernels promise exactly these, whatever a backend returns.
    """
    N, C, H, W = like.shape
    if like.is_contiguous():
        return (C * H * W, H * W, W, 1)
    return (H * W, N * H * W, W, 1) if is_cnhw(like) else (C * H * W, 1, W * C, C)


def as_format_of(value: Tensor, like: Tensor) -> Tensor:
    """The value, of like's shape, with exactly the strides of `dense_strides`; a copy only where it is in another."""
    expected = dense_strides(like)
    if value.stride() == expected:
        return value
    value = in_format_of(value, like)
    return value if value.stride() == expected else value.as_strided(value.shape, expected)


def problem_of(x: Tensor, kernel: tuple[int, int]) -> Problem:
    """The problem that a dense x poses with a kernel of `(Kh, Kw)`."""
    n, c, h, w = x.shape
    return Problem((n, c, h, w), kernel, x.dtype, is_channels_last(x), x.device)


def tf32_allowed() -> bool:
    """Whether torch lets float32 convolutions on CUDA round their inputs to TF32."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # pyright: ignore[reportAttributeAccessIssue]
