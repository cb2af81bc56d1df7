"""`nn.Conv2d` with a 1x1 kernel, run as a matrix product in the memory format of its input."""

import torch
from torch import Tensor, nn

from replknet.layers.epilogue import Activated, product_over_channels
from replknet.ops import is_cnhw, recording_a_portable_graph


class PointwiseConv2d(Activated, nn.Conv2d):
    """Drop-in 1x1 `nn.Conv2d`: same constructor, parameters and state-dict keys.

    Kernel 1x1, stride 1, no padding and one group run as a matrix product of the weight `[C_out, C_in]`, which
    compilers can join with what follows, and for which matrix libraries are better tuned than convolution libraries;
    everything else runs as torch's convolution. The output has the memory format of the input: channels_last is one
    product over all pixels, CNHW (a view `[N, C, H, W]` of a contiguous `[C, N, H, W]`) likewise, contiguous one
    product an image; in channels_last the activation is part of the product where `product_over_channels` can.

    Shapes: `[N, C_in, H, W]` or `[C_in, H, W]` in; as `nn.Conv2d` out.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d's own name
        """Convolve `[N, C_in, H, W]` or `[C_in, H, W]`."""
        if input.dim() != 4 or recording_a_portable_graph() or why_not_matrix_product(self) is not None:
            return self.activate(super().forward(input))
        matrix = self.weight.flatten(1)
        if input.is_contiguous():
            return self.activate(_image_by_image(input, matrix, self.bias))
        if is_cnhw(input):
            return self.activate(_all_pixels_of_channels(input, matrix, self.bias))
        pixels = input.permute(0, 2, 3, 1)
        return product_over_channels(pixels, matrix, self.bias, self.activation).permute(0, 3, 1, 2)


class StridedPointwiseConv2d(PointwiseConv2d):
    """Drop-in 1x1 `nn.Conv2d` with strides: a matrix product over the channels of the pixels that it meets.

    On a CPU with AVX-512 the weight gradient of torch's own (2.14) writes past its memory in channels_last: seen with
    stride 2, 1 to 8 input channels and maps of 96x96 and 224x224, not with 16 channels or 32x32.

    Shapes: as `PointwiseConv2d`; the output is channels_last.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d's own name
        """Convolve `[N, C_in, H, W]` or `[C_in, H, W]`."""
        if input.dim() != 4 or recording_a_portable_graph() or why_not_product_of_samples(self) is not None:
            return super().forward(input)
        sampled = input[:, :, :: self.stride[0], :: self.stride[1]].contiguous(memory_format=torch.channels_last)
        pixels = sampled.permute(0, 2, 3, 1)
        return product_over_channels(pixels, self.weight.flatten(1), self.bias, self.activation).permute(0, 3, 1, 2)


def why_not_matrix_product(conv: nn.Conv2d) -> str | None:
    """None where the convolution is a matrix product over channels, else the reason why not."""
    if tuple(conv.stride) != (1, 1):
        return f"stride {tuple(conv.stride)}"
    return why_not_product_of_samples(conv)


def why_not_product_of_samples(conv: nn.Conv2d) -> str | None:
    """The same where strides may pick the pixels."""
    if tuple(conv.kernel_size) != (1, 1):
        return f"kernel {conv.kernel_size[0]}x{conv.kernel_size[1]}"
    if conv.groups != 1:
        return f"groups={conv.groups}"
    if not isinstance(conv.padding, str) and tuple(conv.padding) != (0, 0):
        return f"padding {tuple(conv.padding)}"
    return None


def _image_by_image(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    N, _, H, W = x.shape
    # Not torch.matmul: to save the sum over images in backward it copies x, transposed, in forward.
    y = torch.bmm(matrix.expand(N, -1, -1), x.flatten(2))
    y = y if bias is None else y + bias[:, None]
    return y.view(N, len(matrix), H, W)


def _all_pixels_of_channels(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    N, _, H, W = x.shape
    y = torch.mm(matrix, x.transpose(0, 1).flatten(1))
    y = y if bias is None else y + bias[:, None]
    return y.view(len(matrix), N, H, W).transpose(0, 1)
