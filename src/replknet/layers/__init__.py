"""Modules: the depthwise convolution layer, re-parameterisation, blocks."""

from replknet.layers.depthwise_conv2d import DepthwiseConv2d

__all__ = ["DepthwiseConv2d"]
