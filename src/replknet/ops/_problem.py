"""What a backend has to know about one call, and the two memory formats in which it arrives."""

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


def format_of(x: Tensor) -> torch.memory_format:
    """The format of x, of its copy if it has neither, and of the result."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def problem_of(x: Tensor, kernel: tuple[int, int]) -> Problem:
    """The problem that x, contiguous or channels_last, poses with a kernel of `(Kh, Kw)`."""
    n, c, h, w = x.shape
    return Problem((n, c, h, w), kernel, x.dtype, is_channels_last(x), x.device)


def tf32_allowed() -> bool:
    """Whether torch lets float32 convolutions on CUDA round their inputs to TF32."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # pyright: ignore[reportAttributeAccessIssue]
