"""Convolutions for inference on a CPU: weights in oneDNN's own layout, the activation in the kernel."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from replknet.layers.depthwise_conv2d import why_not_same_depthwise
from replknet.layers.epilogue import Activated
from replknet.ops import depthwise_conv2d, recording_a_portable_graph

_SLOW_WIDTHS = (11, 13)


@functools.cache
def _dtypes() -> tuple[torch.dtype, ...]:
    """What oneDNN takes here in its own layout; bfloat16 needs AVX-512 or AVX-NE-CONVERT."""
    bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if bfloat16 else (torch.float32,)


class _Packed:
    """A weight in oneDNN's layout and what it was made of; left behind by copies and pickles, which make their own."""

    def __init__(self, key: Any = None, weight: Tensor | None = None) -> None:
        self.key, self.weight = key, weight

    def __reduce__(self) -> tuple[type[_Packed], tuple[()]]:
        return _Packed, ()


class PackedConv2d(Activated, nn.Conv2d):
    """Drop-in `nn.Conv2d`: same parameters and state-dict keys, any groups, float32 or bfloat16.

    torch's convolution and matrix product rearrange the weight at every call, which for one image takes as long as a
    third of the arithmetic. Here that is done once, and again after the weight has changed. Where a gradient is asked
    for, or a graph is recorded or compiled, the layer is torch's convolution. The activation runs in the same kernel.
    """

    _packed: _Packed | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C_in, H, W]`, or `[C_in, H, W]` as `nn.Conv2d`; channels_last out."""
        if not self._can_run(x):
            return self.activate(self._unpacked(x))
        channels_last = x.contiguous(memory_format=torch.channels_last)
        attributes = (self.padding, self.stride, self.dilation, self.groups, self.activation or "none", [], "none")
        return torch.ops.mkldnn._convolution_pointwise(channels_last, self._weight(x), self.bias, *attributes)

    def _unpacked(self, x: Tensor) -> Tensor:
        if x.dim() == 4 and why_not_same_depthwise(self) is None and not recording_a_portable_graph():
            return depthwise_conv2d(x, self.weight, self.bias)
        return super().forward(x)

    def _can_run(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or recording_a_portable_graph() or torch.is_autocast_enabled("cpu"):
            return False
        if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
            return False
        graph = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if self.groups > 1 and any(k > 2 * size - 1 for k, size in zip(self.kernel_size, x.shape[-2:], strict=True)):
            return False  # taps that reach no pixel: the operator leaves them out
        same = x.dtype == self.weight.dtype and x.dtype in _dtypes()
        return same and x.is_cpu and x.dim() == 4 and x.numel() > 0 and type(x) is Tensor and not graph

    def _weight(self, x: Tensor) -> Tensor:
        key = (self.weight.data_ptr(), self.weight._version, self.weight.dtype)
        if self._packed is None or self._packed.key != key:
            like_torchs = self.weight.detach().contiguous().to_mkldnn()
            attributes = (self.padding, self.stride, self.dilation, self.groups, list(x.shape))
            packed = torch.ops.aten.mkldnn_reorder_conv2d_weight(like_torchs, *attributes)
            self._packed = _Packed(key, packed)
        assert self._packed.weight is not None
        return self._packed.weight


def why_not_packed(conv: nn.Conv2d) -> str | None:
    """None where oneDNN can run the convolution with a weight in its own layout, else the reason why not."""
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    if conv.weight.device.type != "cpu" or conv.weight.dtype not in (torch.float32, torch.bfloat16):
        return f"{conv.weight.dtype} on {conv.weight.device}"
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        return f"padding {conv.padding}, {conv.padding_mode}"
    if conv.groups > 1 and conv.kernel_size[1] in _SLOW_WIDTHS:
        return f"oneDNN is slow at a width of {conv.kernel_size[1]}, which the operator avoids"
    if conv.groups > 1 and conv.weight.dtype != torch.float32:
        return "grouped convolutions are faster in float32"
    if conv.weight.dtype not in _dtypes():
        return f"oneDNN has no kernels for {conv.weight.dtype} on this processor"
    return None
