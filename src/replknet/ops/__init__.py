"""Operators on tensors; no modules, no state."""

from replknet.ops.depthwise_conv2d import depthwise_conv2d

__all__ = ["depthwise_conv2d"]
