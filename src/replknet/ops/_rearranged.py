"""Backend "rearranged": all three passes as torch's forward convolution, in the format in which that is fastest.

torch's forward kernels are tuned and its gradients of large depthwise kernels are not; on a CPU only the channels_last
forward has a kernel made for large sizes. So the input gradient is computed as the convolution of the output gradient
with the flipped kernel, and the weight gradient as the depthwise convolution of x with the output gradient as kernel.
On a CPU, half-precision inputs are computed in float32 and rounded at the end, which is also many times faster there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Kernel sizes up to this run faster in channels_last on CUDA (cuDNN), larger ones in NCHW (H100, torch 2.11).
CUDA_CHANNELS_LAST_KERNEL = 7


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """`[N, C, H, W]` in x's dtype; the format is the one that was fast."""
    dtype = x.dtype
    if x.is_cpu and dtype in (torch.float16, torch.bfloat16):
        x, weight = x.float(), weight.float()
        bias = None if bias is None else bias.float()
    fast = _fast_format(x, max(weight.shape[2:]))
    y = _convolve(x.contiguous(memory_format=fast), weight, bias)
    return (y.relu_() if activation == "relu" else y).to(dtype)


def input_grad(grad_y: Tensor, weight: Tensor) -> Tensor:
    """Gradient with respect to x, `[N, C, H, W]`: the forward pass with the kernel turned by 180 degrees."""
    return forward(grad_y, weight.flip(2, 3), None, None)


def weight_grad(grad_y: Tensor, x: Tensor, kh: int, kw: int) -> Tensor:
    """Gradient with respect to the weight, `[C, 1, Kh, Kw]`, images summed in a fixed order in float32 or wider."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.is_cpu:
        return _weight_grad_by_image(grad_y.to(wide), x.to(wide), (kh, kw)).to(x.dtype)
    N, C, H, W = x.shape
    # H rows of image, padded by Kh // 2, under a kernel of H rows give 2 * (Kh // 2) + 1 = Kh rows. Images become
    # channels: one launch for all of them, and no copy where x is contiguous.
    kernels = grad_y.reshape(N * C, 1, H, W)
    each = F.conv2d(x.reshape(1, N * C, H, W), kernels, padding=(kh // 2, kw // 2), groups=N * C)
    return each.reshape(N, C, kh, kw).sum(0, dtype=wide).unsqueeze(1).to(x.dtype)


def _weight_grad_by_image(grad_y: Tensor, x: Tensor, kernel: tuple[int, int]) -> Tensor:
    # One convolution for all images would have to copy x to [H, W, N * C] first, which costs more than it saves.
    C, H, W = x.shape[1:]
    padding = (kernel[0] // 2, kernel[1] // 2)
    x = x.contiguous(memory_format=torch.channels_last)
    total = x.new_zeros(1, C, *kernel)
    for image, gradient in zip(x.unsqueeze(1), grad_y, strict=True):
        total += F.conv2d(image, gradient.reshape(C, 1, H, W), padding=padding, groups=C)
    return total.reshape(C, 1, *kernel)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(x, weight, bias, padding=padding, groups=x.shape[1])


def _fast_format(x: Tensor, kernel: int) -> torch.memory_format:
    if x.is_cpu or (x.is_cuda and kernel <= CUDA_CHANNELS_LAST_KERNEL and x.dtype != torch.float64):
        return torch.channels_last
    return torch.contiguous_format
