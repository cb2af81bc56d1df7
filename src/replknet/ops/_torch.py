"""Backend "torch": torch's own convolution and torch's own gradients, in the format in which the input comes."""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """`[N, C, H, W]` in x's dtype; the format is torch's choice."""
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    y = F.conv2d(x, weight, bias, padding=padding, groups=x.shape[1])
    return y.relu_() if activation == "relu" else y


def input_grad(grad_y: Tensor, weight: Tensor) -> Tensor:
    """Gradient with respect to x, `[N, C, H, W]`."""
    return _gradients(grad_y, grad_y, weight, (True, False, False))[0]


def weight_grad(grad_y: Tensor, x: Tensor, kh: int, kw: int) -> Tensor:
    """Gradient with respect to the weight, `[C, 1, Kh, Kw]`."""
    return _gradients(grad_y, x, x.new_empty(x.shape[1], 1, kh, kw), (False, True, False))[1]


def _gradients(grad_y: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]) -> tuple[Tensor, ...]:
    padding = [weight.shape[2] // 2, weight.shape[3] // 2]
    groups = x.shape[1]
    return torch.ops.aten.convolution_backward.default(
        grad_y, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], groups, list(wanted)
    )
