"""Activations that a layer applies where it writes its output."""

import torch
import torch.nn.functional as F
from timm.layers.activations import GELU
from torch import Tensor, nn

from replknet.ops import Epilogue, linear_activation

_ACTIVATIONS = {None: lambda y: y, "relu": torch.relu, "gelu": F.gelu}


class Activated(nn.Module):
    """Mixed into a layer that can take over the activation behind it.

    Attributes:
        activation: None, "relu" or "gelu" (exact), applied to the output.
    """

    activation: Epilogue | None = None

    def activate(self, y: Tensor) -> Tensor:
        """The activation of a tensor of any shape."""
        return _ACTIVATIONS[self.activation](y)

    def absorb(self, act: nn.Module) -> nn.Module:
        """Take over `act` where a kernel has it; returns what is left of it to apply."""
        exact_gelu = type(act) is GELU or (type(act) is nn.GELU and act.approximate == "none")
        if self.activation is not None or not (exact_gelu or type(act) is nn.ReLU):
            return act
        self.activation = "gelu" if exact_gelu else "relu"
        return nn.Identity().train(act.training)


def product_over_channels(pixels: Tensor, matrix: Tensor, bias: Tensor | None, activation: Epilogue | None) -> Tensor:
    """`[..., K]` times `[C, K]`, with bias `[C]` and activation, to `[..., C]`.

    On CUDA and without gradient bias and activation are applied in the kernel of the product: "relu" in 16-bit dtypes,
    "gelu" in bfloat16 alone, whose rounding hides the tanh form that the kernel has.
    """
    if activation is None or bias is None or not _has_epilogue(pixels, matrix, activation):
        return _ACTIVATIONS[activation](F.linear(pixels, matrix, bias))
    return linear_activation(pixels.flatten(0, -2), matrix, bias, activation).view(*pixels.shape[:-1], len(matrix))


def _has_epilogue(pixels: Tensor, matrix: Tensor, activation: Epilogue) -> bool:
    dtypes = (torch.bfloat16,) if activation == "gelu" else (torch.bfloat16, torch.float16)
    if not pixels.is_cuda or pixels.dtype not in dtypes or pixels.dtype != matrix.dtype:
        return False
    graph = torch.is_grad_enabled() and (pixels.requires_grad or matrix.requires_grad)
    return not graph and pixels.is_contiguous() and pixels.numel() > 0
