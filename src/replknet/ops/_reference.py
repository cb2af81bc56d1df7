"""The operator in plain torch, twice: tap by tap as it is defined, and by FFT. In float64 the oracles of every test."""

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_conv2d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Stride-1 "same" depthwise convolution by its definition, with nothing of torch's convolutions in it.

    y[n,c,h,w] = bias[c] + sum_ij weight[c,0,i,j] * x[n,c,h+i-Kh//2,w+j-Kw//2], zeros outside the image.

    Args:
        x: `[N, C, H, W]`, floating point; float64 makes it the oracle.
        weight: `[C, 1, Kh, Kw]` of x's dtype, Kh and Kw odd.
        bias: `[C]` or None.
        activation: None or "relu".

    Returns:
        `[N, C, H, W]` in x's dtype, accumulated in x's dtype. Differentiable to any order.
    """
    H, W = x.shape[2:]
    Kh, Kw = weight.shape[2:]
    padded = F.pad(x, (Kw // 2, Kw // 2, Kh // 2, Kh // 2))
    y = x.new_zeros(x.shape)
    for i in range(Kh):
        for j in range(Kw):
            y = y + weight[:, 0, i, j].view(1, -1, 1, 1) * padded[:, :, i : i + H, j : j + W]
    if bias is not None:
        y = y + bias.view(1, -1, 1, 1)
    return y.relu() if activation == "relu" else y


def depthwise_conv2d_fft(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same by the convolution theorem: the time does not depend on the kernel size.

    Args:
        x: `[N, C, H, W]`, float32 or float64 (half precision on GPUs only where cuFFT takes the size).
        weight: `[C, 1, Kh, Kw]` of x's dtype, Kh and Kw odd.
        bias: `[C]` or None.

    Returns:
        `[N, C, H, W]` in x's dtype. Differentiable to any order.
    """
    (H, W), (Kh, Kw) = x.shape[2:], weight.shape[2:]
    size = (H + Kh - 1, W + Kw - 1)
    spectrum = torch.fft.rfft2(x, s=size) * torch.fft.rfft2(weight.flip(2, 3).transpose(0, 1), s=size)
    y = torch.fft.irfft2(spectrum, s=size)[:, :, Kh // 2 : Kh // 2 + H, Kw // 2 : Kw // 2 + W]
    return y if bias is None else y + bias.view(1, -1, 1, 1)
