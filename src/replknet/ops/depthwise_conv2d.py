"""Stride-1 "same" depthwise convolution: the public contract."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Backend = Literal["auto", "torch"]


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None, backend: Backend = "auto"
) -> Tensor:
    """Stride-1 "same" depthwise convolution."""
    y = F.conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2), groups=x.shape[1])
    return y.relu() if activation == "relu" else y
