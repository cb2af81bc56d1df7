"""The two blocks of a RepLKNet layer. State-dict keys and their order are the release's.

Source: Ding et al. 2022, arXiv:2203.06717, fig. 2 and sec. 4.1.
"""

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from replknet.layers.conv_norm import NormLayer, conv_norm, refuse_training
from replknet.layers.depthwise_conv2d import DepthwiseConv2d
from replknet.layers.reparam_large_kernel_conv import ReparamLargeKernelConv


def _drop_path(rate: float) -> nn.Module:
    return DropPath(rate) if rate > 0.0 else nn.Identity()


class RepLKBlock(nn.Module):
    """x + drop_path(pw2(relu(large_kernel(pw1(norm(x)))))), pw1 with a ReLU; `[N, C, H, W]` to the same.

    Args:
        channels: channels of input and output.
        kernel_size: of the depthwise convolution, odd.
        small_kernel: of the small kernel beside it in training; None for none.
        dw_channels: width of the depthwise convolution; None for `channels`.
        drop_path: probability of leaving the block out, per sample.
        norm_layer: makes every norm.
        merged: build the large kernel merged.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        small_kernel: int | None = None,
        *,
        dw_channels: int | None = None,
        drop_path: float = 0.0,
        norm_layer: NormLayer = nn.BatchNorm2d,
        merged: bool = False,
    ):
        super().__init__()
        width = dw_channels or channels
        self.pw1 = conv_norm(channels, width, 1, norm_layer=norm_layer, act=nn.ReLU())
        self.pw2 = conv_norm(width, channels, 1, norm_layer=norm_layer)
        self.large_kernel = ReparamLargeKernelConv(
            width, kernel_size, small_kernel, norm_layer=norm_layer, merged=merged
        )
        self.lk_nonlinear = nn.ReLU()
        self.prelkb_bn = norm_layer(channels)
        self.drop_path = _drop_path(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` to the same."""
        y = self.pw1(self.prelkb_bn(x))
        y = self.lk_nonlinear(self.large_kernel(y))
        return x + self.drop_path(self.pw2(y))

    @torch.no_grad()
    def fuse(self) -> "RepLKBlock":
        """Merge the kernels and fold every norm; in place, idempotent, evaluation only."""
        refuse_training(self)
        convolution = self.large_kernel.fuse().lkb_reparam
        if isinstance(convolution, DepthwiseConv2d):
            self.lk_nonlinear = convolution.absorb(self.lk_nonlinear)
        self.pw1.fuse(pre_norm=self.prelkb_bn)
        self.prelkb_bn = nn.Identity().eval()
        self.pw2.fuse()
        return self


class ConvFFN(nn.Module):
    """x + drop_path(pw2(gelu(pw1(norm(x))))), 1x1 convolutions with norms; `[N, C, H, W]` to the same.

    Args:
        channels: channels of input and output.
        hidden_channels: width in the middle.
        drop_path: probability of leaving the block out, per sample.
        norm_layer: makes every norm.
    """

    def __init__(
        self, channels: int, hidden_channels: int, *, drop_path: float = 0.0, norm_layer: NormLayer = nn.BatchNorm2d
    ):
        super().__init__()
        self.preffn_bn = norm_layer(channels)
        self.pw1 = conv_norm(channels, hidden_channels, 1, norm_layer=norm_layer)
        self.pw2 = conv_norm(hidden_channels, channels, 1, norm_layer=norm_layer)
        self.nonlinear = nn.GELU()
        self.drop_path = _drop_path(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` to the same."""
        y = self.nonlinear(self.pw1(self.preffn_bn(x)))
        return x + self.drop_path(self.pw2(y))

    @torch.no_grad()
    def fuse(self) -> "ConvFFN":
        """Fold every norm; in place, idempotent, evaluation only."""
        refuse_training(self)
        self.pw1.fuse(pre_norm=self.preffn_bn)
        self.preffn_bn = nn.Identity().eval()
        self.pw2.fuse()
        return self
