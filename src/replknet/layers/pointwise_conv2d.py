"""`nn.Conv2d` with a 1x1 kernel, run as a matrix product in the memory format of its input."""

import torch
import torch.nn.functional as F
from timm.layers.activations import GELU
from torch import Tensor, nn

from replknet.ops import Epilogue, is_cnhw, linear_activation, recording_a_portable_graph


class PointwiseConv2d(nn.Conv2d):
    """Drop-in 1x1 `nn.Conv2d`: same constructor, parameters and state-dict keys.

    Kernel 1x1, stride 1, no padding and one group run as a matrix product of the weight `[C_out, C_in]`, which
    compilers can join with what follows, and for which matrix libraries are better tuned than convolution libraries;
    everything else runs as torch's convolution. The output has the memory format of the input: channels_last is one
    product over all pixels, CNHW (a view `[N, C, H, W]` of a contiguous `[C, N, H, W]`) likewise, contiguous one
    product an image.

    Shapes: `[N, C_in, H, W]` or `[C_in, H, W]` in; as `nn.Conv2d` out.

    Attributes:
        activation: None, "relu" or "gelu", applied to the output; on CUDA, in channels_last and without gradient, in
            the same kernel: "relu" in 16-bit dtypes, "gelu" in bfloat16 alone, whose rounding hides the tanh form.
    """

    activation: Epilogue | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d's own name
        """Convolve `[N, C_in, H, W]` or `[C_in, H, W]`."""
        if input.dim() != 4 or recording_a_portable_graph() or why_not_matrix_product(self) is not None:
            return ACTIVATIONS[self.activation](super().forward(input))
        matrix = self.weight.flatten(1)
        if input.is_contiguous():
            return ACTIVATIONS[self.activation](_image_by_image(input, matrix, self.bias))
        if is_cnhw(input):
            return ACTIVATIONS[self.activation](_all_pixels_of_channels(input, matrix, self.bias))
        pixels = input.permute(0, 2, 3, 1)
        return product_over_channels(pixels, matrix, self.bias, self.activation).permute(0, 3, 1, 2)

    def absorb(self, act: nn.Module) -> nn.Module:
        """Take over the activation behind this layer where a kernel has it; returns what is left of it to apply."""
        exact_gelu = type(act) is GELU or (type(act) is nn.GELU and act.approximate == "none")
        if self.activation is not None or not (exact_gelu or type(act) is nn.ReLU):
            return act
        self.activation = "gelu" if exact_gelu else "relu"
        return nn.Identity().train(act.training)


def product_over_channels(pixels: Tensor, matrix: Tensor, bias: Tensor | None, activation: Epilogue | None) -> Tensor:
    """`[..., K]` times `[C, K]`, with bias `[C]` and activation, to `[..., C]`."""
    if activation is None or bias is None or not _has_epilogue(pixels, matrix, activation):
        return ACTIVATIONS[activation](F.linear(pixels, matrix, bias))
    return linear_activation(pixels.flatten(0, -2), matrix, bias, activation).view(*pixels.shape[:-1], len(matrix))


def _has_epilogue(pixels: Tensor, matrix: Tensor, activation: Epilogue) -> bool:
    """Whether the matrix library applies bias and activation where it writes, as exactly as the dtype can tell."""
    dtypes = (torch.bfloat16,) if activation == "gelu" else (torch.bfloat16, torch.float16)
    if not pixels.is_cuda or pixels.dtype not in dtypes or pixels.dtype != matrix.dtype:
        return False
    graph = torch.is_grad_enabled() and (pixels.requires_grad or matrix.requires_grad)
    return not graph and pixels.is_contiguous() and pixels.numel() > 0


def why_not_matrix_product(conv: nn.Conv2d) -> str | None:
    """None where the convolution is a matrix product over channels, else the reason why not."""
    if tuple(conv.kernel_size) != (1, 1):
        return f"kernel {conv.kernel_size[0]}x{conv.kernel_size[1]}"
    if conv.groups != 1:
        return f"groups={conv.groups}"
    if tuple(conv.stride) != (1, 1):
        return f"stride {tuple(conv.stride)}"
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


ACTIVATIONS = {None: lambda y: y, "relu": torch.relu, "gelu": F.gelu}
