"""Small strided depthwise convolutions as sums of shifted inputs, for compilers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replknet.layers.cnhw_conv2d import as_cnhw
from replknet.layers.depthwise_conv2d import DepthwiseConv2d, why_not_same_depthwise
from replknet.ops import is_cnhw, recording_a_portable_graph
from replknet.ops.depthwise_conv2d import under_autocast


class ShiftedDepthwiseConv2d(DepthwiseConv2d):
    """Drop-in strided depthwise `nn.Conv2d`: each tap of the kernel scales a shifted view of the input.

    A compiler makes one pass over memory of it, joined with norm and activation around it, in any memory format, and
    its gradients likewise, where libraries have slow gradients of depthwise convolutions. Run uncompiled it is slow.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `[N, C, H, W]` or `[C, H, W]`."""
        if x.dim() != 4 or recording_a_portable_graph() or why_not_shifted(self) is not None:
            return super().forward(x)
        x, weight, bias = under_autocast(x, self.weight, self.bias)
        y = _sum_of_taps(x, weight, self.stride, self.padding)  # type: ignore[arg-type]
        y = y if bias is None else y + bias[:, None, None]
        y = (y.relu() if self.activation == "relu" else y).to(x.dtype)
        return as_cnhw(y) if is_cnhw(x) else y


def why_not_shifted(conv: nn.Conv2d) -> str | None:
    """None where a depthwise convolution is strided and of few taps, else the reason why not."""
    if conv.groups != conv.in_channels or conv.out_channels != conv.in_channels:
        return f"groups={conv.groups} for {conv.in_channels} to {conv.out_channels} channels"
    if why_not_same_depthwise(conv) is None:
        return "has a kernel of its own"
    if conv.kernel_size[0] * conv.kernel_size[1] > 9:
        return f"kernel {conv.kernel_size[0]}x{conv.kernel_size[1]}"
    if tuple(conv.dilation) != (1, 1) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"dilation {tuple(conv.dilation)}, padding {conv.padding}, {conv.padding_mode}"
    return None


def _sum_of_taps(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """The convolution without bias, accumulated in float32 (float64 for float64)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    H, W = ((size - k) // s + 1 for size, k, s in zip(padded.shape[2:], weight.shape[2:], stride, strict=True))
    taps = [
        padded[:, :, i : i + (H - 1) * stride[0] + 1 : stride[0], j : j + (W - 1) * stride[1] + 1 : stride[1]].to(wide)
        * weight[:, :, i, j, None].to(wide)
        for i in range(weight.shape[2])
        for j in range(weight.shape[3])
    ]
    total = taps[0]
    for tap in taps[1:]:
        total = total + tap
    return total
