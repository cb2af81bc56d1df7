"""A convolution and its norm, the unit that everything else is built of."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from replknet.layers.algebra import fold_after, fold_before, norm_affine, replaced, to_float64
from replknet.layers.depthwise_conv2d import DepthwiseConv2d

NormLayer = Callable[[int], nn.Module]
"""Makes the norm of so many channels, for example `nn.BatchNorm2d` or `nn.SyncBatchNorm`."""


class ConvNorm(nn.Module):
    """Convolution, norm, activation; state-dict keys `conv.*` and `bn.*`, after `fuse()` only `conv.*`.

    Args:
        conv: the convolution, any number of dimensions.
        norm: the norm behind it; `nn.Identity()` for none.
        act: the activation behind that; None for none.
    """

    def __init__(self, conv: nn.Module, norm: nn.Module, act: nn.Module | None = None):
        super().__init__()
        self.conv = conv
        self.bn = norm
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C_in, ...]` to `[N, C_out, ...]`."""
        return self.act(self.bn(self.conv(x)))

    def equivalent(self) -> tuple[Tensor, Tensor]:
        """Float64 weight and bias of the one convolution that equals convolution and norm in evaluation."""
        weight, bias = self.conv.weight, self.conv.bias
        weight, bias = to_float64(weight), None if bias is None else to_float64(bias)  # type: ignore[arg-type]
        if isinstance(self.bn, nn.Identity):
            return weight, weight.new_zeros(len(weight)) if bias is None else bias
        return fold_after(weight, bias, *norm_affine(self.bn))

    @torch.no_grad()
    def fuse(self, pre_norm: nn.Module | None = None) -> "ConvNorm":
        """Fold the norm, and `pre_norm` in front of a 1x1 convolution, into the convolution; in place, idempotent.

        Raises:
            ValueError: in training mode, or a norm that is no fixed affine map.
        """
        refuse_training(self)
        if isinstance(pre_norm, nn.Identity):
            pre_norm = None
        if isinstance(self.bn, nn.Identity) and pre_norm is None:
            return self
        weight, bias = self.equivalent()
        if pre_norm is not None:
            weight, bias = fold_before(weight, bias, *norm_affine(pre_norm))
        old = self.conv.weight
        self.conv.weight = replaced(old, weight)  # type: ignore[arg-type]
        self.conv.bias = replaced(old, bias)  # type: ignore[arg-type]
        self.bn = nn.Identity().eval()
        if isinstance(self.conv, DepthwiseConv2d):
            self.act = self.conv.absorb(self.act)
        return self


def conv_norm(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    norm_layer: NormLayer = nn.BatchNorm2d,
    act: nn.Module | None = None,
) -> ConvNorm:
    """A 2-D unit with "same" padding and no convolution bias; depthwise ones are `DepthwiseConv2d`."""
    cls = DepthwiseConv2d if groups == in_channels == out_channels and groups > 1 else nn.Conv2d
    conv = cls(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    return ConvNorm(conv, norm_layer(out_channels), act)


def refuse_training(module: nn.Module) -> None:
    """Raise ValueError if `module` or a norm inside is in training mode, where folding would change the answers."""
    for name, child in module.named_modules():
        if child.training and (child is module or hasattr(child, "running_mean")):
            where = f"{type(module).__name__}" + (f".{name}" if name else "")
            raise ValueError(f"re-parameterisation is for evaluation; {where} is in training mode: call .eval() first")
