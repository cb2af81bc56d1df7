"""Operators on tensors; no modules, no state."""

from replknet.ops._dispatch import BACKENDS, Backend, Choice, Explanation, explain
from replknet.ops._problem import is_cnhw
from replknet.ops._reference import depthwise_conv2d_fft, depthwise_conv2d_reference
from replknet.ops._tuning import autotune
from replknet.ops.depthwise_conv2d import Activation, depthwise_conv2d, recording_a_portable_graph
from replknet.ops.linear_activation import Epilogue, linear_activation

__all__ = [
    "BACKENDS",
    "Activation",
    "Backend",
    "Choice",
    "Epilogue",
    "Explanation",
    "autotune",
    "depthwise_conv2d",
    "depthwise_conv2d_fft",
    "depthwise_conv2d_reference",
    "explain",
    "is_cnhw",
    "linear_activation",
    "recording_a_portable_graph",
]
