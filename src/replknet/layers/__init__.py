"""Modules: the depthwise convolution layer, re-parameterisation, blocks."""

from replknet.layers.blocks import ConvFFN, RepLKBlock
from replknet.layers.conv_norm import ConvNorm, conv_norm
from replknet.layers.depthwise_conv2d import DepthwiseConv2d
from replknet.layers.pointwise_conv2d import PointwiseConv2d
from replknet.layers.reparam_large_kernel_conv import (
    Branch,
    ReparamLargeKernelConv,
    ReparamLargeKernelConv1d,
    ReparamLargeKernelConv3d,
)
from replknet.layers.reparameterize import reparameterize

__all__ = [
    "Branch",
    "ConvFFN",
    "ConvNorm",
    "DepthwiseConv2d",
    "PointwiseConv2d",
    "RepLKBlock",
    "ReparamLargeKernelConv",
    "ReparamLargeKernelConv1d",
    "ReparamLargeKernelConv3d",
    "conv_norm",
    "reparameterize",
]
