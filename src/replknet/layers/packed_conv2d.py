"""Convolutions for inference on a CPU: weights in oneDNN's own layout, the activation in the kernel."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replknet.layers.depthwise_conv2d import why_not_same_depthwise
from replknet.layers.epilogue import Activated
from replknet.ops import depthwise_conv2d, recording_a_portable_graph
from replknet.ops._cpu import FAST_WIDTH, SLOW_WIDTHS, has_avx512


@functools.cache
def _dtypes() -> tuple[torch.dtype, ...]:
    """What oneDNN takes here in its own layout; bfloat16 needs AVX-512 or AVX-NE-CONVERT."""
    bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if bfloat16 else (torch.float32,)


class _Packed:
    """A weight in oneDNN's layout, the bias and padding that go with it, and what they were made of.

    Left behind by copies and pickles, which make their own.
    """

    def __init__(
        self, key: Any = None, weight: Tensor | None = None, bias: Tensor | None = None, padding: tuple[int, ...] = ()
    ) -> None:
        self.key, self.weight, self.bias, self.padding = key, weight, bias, padding

    def __reduce__(self) -> tuple[type[_Packed], tuple[()]]:
        return _Packed, ()


class PackedConv2d(Activated, nn.Conv2d):
    """Drop-in `nn.Conv2d`: same parameters and state-dict keys, any groups, float32 or bfloat16.

    torch's convolution and matrix product rearrange the weight at every call, which for one image takes as long as a
    third of the arithmetic. Here that is done once, and again after the weight has changed. Where a gradient is asked
    for, or a graph is recorded or compiled, the layer is torch's convolution. The activation runs in the same kernel.
    Depthwise convolutions of bfloat16 are computed in float32.
    """

    _packed: _Packed | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C_in, H, W]`, or `[C_in, H, W]` as `nn.Conv2d`; channels_last out."""
        if not self._can_run(x):
            return self.activate(self._unpacked(x))
        packed = self._pack(x)
        assert packed.weight is not None
        dtype = torch.float32 if self.groups > 1 else x.dtype
        channels_last = x.contiguous(memory_format=torch.channels_last).to(dtype)
        attributes = (packed.padding, self.stride, self.dilation, self.groups, self.activation or "none", [], "none")
        y = torch.ops.mkldnn._convolution_pointwise(channels_last, packed.weight, packed.bias, *attributes)
        return y.to(x.dtype)

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

    def _pack(self, x: Tensor) -> _Packed:
        tensors = (self.weight,) if self.bias is None else (self.weight, self.bias)
        key = tuple((tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in tensors)
        if self._packed is None or self._packed.key != key:
            weight, bias, padding = self.weight.detach(), self.bias, self.padding
            assert not isinstance(padding, str)
            if self.groups > 1:
                weight, bias = weight.float(), None if bias is None else bias.detach().float()
                # Done once, columns of zeros pay for themselves on every map: 0.3 of the time on 7², 0.9 on 56².
                if self.kernel_size[1] in SLOW_WIDTHS:
                    wider = (FAST_WIDTH - self.kernel_size[1]) // 2
                    weight, padding = F.pad(weight, (wider, wider)), (padding[0], padding[1] + wider * self.dilation[1])
            attributes = (padding, self.stride, self.dilation, self.groups, list(x.shape))
            weight = torch.ops.aten.mkldnn_reorder_conv2d_weight(weight.contiguous().to_mkldnn(), *attributes)
            self._packed = _Packed(key, weight, bias, padding)
        return self._packed


def why_not_packed(conv: nn.Conv2d) -> str | None:
    """None where oneDNN can run the convolution with a weight in its own layout, else the reason why not."""
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    if conv.weight.device.type != "cpu" or conv.weight.dtype not in (torch.float32, torch.bfloat16):
        return f"{conv.weight.dtype} on {conv.weight.device}"
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        return f"padding {conv.padding}, {conv.padding_mode}"
    if conv.groups > 1 and conv.kernel_size[1] in SLOW_WIDTHS and not has_avx512():
        return f"the operator may be faster at a width of {conv.kernel_size[1]}"
    if 1 < conv.groups < conv.in_channels and conv.weight.dtype != torch.float32:
        return "grouped convolutions of half precision are torch's"
    if conv.weight.dtype not in _dtypes():
        return f"oneDNN has no kernels for {conv.weight.dtype} on this processor"
    return None
