"""Dense convolutions of few input channels as matrix products over unfolded images, for compilers."""

import torch.nn.functional as F
from torch import Tensor, nn

from replknet.layers.epilogue import Activated, product_over_channels
from replknet.ops import recording_a_portable_graph
from replknet.ops.depthwise_conv2d import under_autocast

_MOST_TAPS = 64


class UnfoldedConv2d(Activated, nn.Conv2d):
    """Drop-in `nn.Conv2d` for the first layer of a network: images unfolded by a compiler, then one matrix product.

    Libraries' convolutions of three channels use a small part of a GPU. The rows of the unfolded image are padded to a
    multiple of 8 values, so that the matrix product can read 16 bytes at a time. Run uncompiled it is slow.
    Output channels_last.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d's own name
        """Convolve `[N, C_in, H, W]` or `[C_in, H, W]`."""
        if input.dim() != 4 or recording_a_portable_graph() or why_not_unfolded(self) is not None:
            return self.activate(super().forward(input))
        x, weight, bias = under_autocast(input, self.weight, self.bias)
        padding: tuple[int, int] = self.padding  # type: ignore[assignment]
        rows = F.unfold(x, self.kernel_size, padding=padding, stride=self.stride).transpose(1, 2)
        sizes = zip(x.shape[2:], self.kernel_size, self.stride, padding, strict=True)
        H, W = ((size + 2 * p - k) // s + 1 for size, k, s, p in sizes)
        matrix = weight.flatten(1)
        fill = (0, -matrix.shape[1] % 8)
        pixels = F.pad(rows, fill).view(len(x), H, W, -1)
        return product_over_channels(pixels, F.pad(matrix, fill), bias, self.activation).permute(0, 3, 1, 2)


def why_not_unfolded(conv: nn.Conv2d) -> str | None:
    """None where a row of the unfolded image is short enough, else the reason why not."""
    taps = conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
    if conv.groups != 1 or taps > _MOST_TAPS or conv.in_channels > 4:
        return f"groups={conv.groups}, {conv.in_channels} input channels, {taps} taps"
    if tuple(conv.dilation) != (1, 1) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"dilation {tuple(conv.dilation)}, padding {conv.padding}, {conv.padding_mode}"
    return None
