"""Backend "rearranged": all three passes by torch's own kernels, in the form in which those are fastest.

torch has fast kernels for some forms of a depthwise convolution and very slow ones for others. The input gradient is
the convolution of the output gradient with the flipped kernel, and the other way round; the weight gradient is the
depthwise convolution of x with the output gradient as kernel. Taps that reach from any pixel past the far border are
left out. On a CPU, `_cpu.py` says which form is fastest, and half precision is computed in float32 and rounded at the
end, which is many times faster there; where tensors have to change their format or dtype, a few images do so at a time,
which stay in the cache.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from replknet.ops import _cpu, _torch
from replknet.ops._cpu import Form, reaching
from replknet.ops._problem import is_channels_last, problem_of

# Kernel sizes up to this run faster in channels_last on CUDA (cuDNN), larger ones in NCHW (H100, torch 2.11).
CUDA_CHANNELS_LAST_KERNEL = 7
_HALF = (torch.float16, torch.bfloat16)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """`[N, C, H, W]` in x's dtype; the format is the one that was fast."""
    return _convolve(x, weight, bias, turned=False, relu=activation == "relu")


def input_grad(grad_y: Tensor, weight: Tensor) -> Tensor:
    """Gradient with respect to x, `[N, C, H, W]`: the forward pass with the kernel turned by 180 degrees."""
    return _convolve(grad_y, weight, None, turned=True)


def weight_grad(grad_y: Tensor, x: Tensor, kh: int, kw: int) -> Tensor:
    """Gradient with respect to the weight, `[C, 1, Kh, Kw]`, images summed in a fixed order in float32 or wider."""
    near = reaching(kh, x.shape[2]), reaching(kw, x.shape[3])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if near == (1, 1):
        grad = (grad_y.to(wide) * x).sum((0, 2, 3)).view(-1, 1, 1, 1)
    elif x.is_cpu:
        grad = _weight_grad_on_cpu(grad_y, x, near, wide)
    else:
        # H rows of image, padded by Kh // 2, under a kernel of H rows give 2 * (Kh // 2) + 1 = Kh rows. Images become
        # channels: one launch for all of them, and no copy where x is contiguous.
        N, C, H, W = x.shape
        kernels = grad_y.reshape(N * C, 1, H, W)
        each = F.conv2d(x.reshape(1, N * C, H, W), kernels, padding=(near[0] // 2, near[1] // 2), groups=N * C)
        grad = each.reshape(N, C, 1, *near).sum(0, dtype=wide)
    rows, columns = (kh - near[0]) // 2, (kw - near[1]) // 2
    grad = grad.to(x.dtype)
    return F.pad(grad, (columns, columns, rows, rows)) if rows or columns else grad


def _reaching_part(weight: Tensor, x: Tensor) -> Tensor:
    (_, _, height, width), (_, _, H, W) = weight.shape, x.shape
    kh, kw = reaching(height, H), reaching(width, W)
    if kh == height and kw == width:
        return weight
    top, left = (height - kh) // 2, (width - kw) // 2
    return weight[:, :, top : top + kh, left : left + kw]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *, turned: bool, relu: bool = False) -> Tensor:
    """The convolution with the weight, or with the weight turned by 180 degrees, in x's dtype."""
    wide = torch.float32 if x.is_cpu and x.dtype in _HALF else x.dtype
    weight, bias = _reaching_part(weight, x).to(wide), None if bias is None else bias.to(wide)
    form = _form_of(x, weight, turned)
    # torch's gradient turns the weight itself.
    weight = weight if turned == form.gradient else weight.flip(2, 3)
    if form.width is not None:
        margin = (form.width - weight.shape[3]) // 2
        weight = F.pad(weight, (margin, margin))
    as_it_is = wide == x.dtype and form.channels_last == is_channels_last(x)
    parts = 1 if as_it_is or not x.is_cpu else _cpu.parts_of(x.shape, wide)
    if parts == 1:
        return _convolve_in(form, x, weight, bias, relu=relu)
    y = torch.empty_like(x)
    for images, out in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
        out.copy_(_convolve_in(form, images, weight, bias, relu=relu))
    return y


def _convolve_in(form: Form, x: Tensor, weight: Tensor, bias: Tensor | None, *, relu: bool) -> Tensor:
    """The convolution as the form says, with a weight prepared for it; x's dtype, the form's format."""
    C, _, kh, kw = weight.shape
    dtype = x.dtype
    if kh == kw == 1:
        x, scale = x.to(weight.dtype), weight.view(1, -1, 1, 1)
        y = x * scale if bias is None else torch.addcmul(bias.view(1, -1, 1, 1), x, scale)
    else:
        # Half precision changes its format before it is widened and after it is rounded. Two copies, one of half the
        # bytes, took 0.3 to 0.8 of the time of torch's one that does both on the way out, 0.6 to 1.2 on the way in.
        layout = torch.channels_last if form.channels_last else torch.contiguous_format
        x = x.contiguous(memory_format=layout).to(weight.dtype)
        if form.gradient:
            y = _torch.input_grad(x, weight)
            y = y if bias is None else y.add_(bias.view(1, -1, 1, 1))
        else:
            y = F.conv2d(x, weight, bias, 1, (kh // 2, kw // 2), 1, C)
    return (y.relu_() if relu else y).to(dtype)


def _form_of(x: Tensor, weight: Tensor, turned: bool) -> Form:
    kernel = (weight.shape[2], weight.shape[3])
    if kernel == (1, 1):
        return Form(is_channels_last(x), turned, "a scaling")
    if x.is_cpu:
        return _cpu.form_of("input_grad" if turned else "forward", problem_of(x, kernel))
    small = x.is_cuda and max(kernel) <= CUDA_CHANNELS_LAST_KERNEL and x.dtype != torch.float64
    return Form(small, False, "cuDNN's small kernels are faster in channels_last, large ones in contiguous tensors")


def _weight_grad_on_cpu(grad_y: Tensor, x: Tensor, kernel: tuple[int, int], wide: torch.dtype) -> Tensor:
    N, C, H, W = x.shape
    way = _cpu.weight_grad_way((N, C, H, W), kernel, wide, channels_last=is_channels_last(x))
    if way == "channels":
        kernels = grad_y.to(wide).reshape(N * C, 1, H, W)
        each = _correlation(x.to(wide).reshape(1, N * C, H, W), kernels, kernel)
        return each.view(N, C, 1, *kernel).sum(0)
    run = _weight_grad_by_strips if way == "strips" else _weight_grad_by_images
    parts = _cpu.parts_of(x.shape, wide)
    pieces = zip(grad_y.tensor_split(parts), x.tensor_split(parts), strict=True)
    total = functools.reduce(torch.add, (run(grads, images, kernel, wide) for grads, images in pieces))
    return total.reshape(C, 1, *kernel)


def _weight_grad_by_images(grad_y: Tensor, x: Tensor, kernel: tuple[int, int], wide: torch.dtype) -> Tensor:
    """`[1, C, *kernel]`."""
    total = torch.zeros(1, x.shape[1], *kernel, dtype=wide)
    for image, grad in zip(x.to(wide).split(1), grad_y.to(wide), strict=True):
        total += _correlation(image, grad.unsqueeze(1), kernel)
    return total


def _correlation(x: Tensor, kernels: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle `[1, C, *size]` of x `[1, C, H, W]` under kernels `[C, 1, H, W]`, by torch's input gradient."""
    C, _, H, W = kernels.shape
    padding = (H - 1 - size[0] // 2, W - 1 - size[1] // 2)
    like_result = x.new_empty(1, C, *size)
    return torch.ops.aten.convolution_backward(
        x, like_result, kernels.flip(2, 3), None, (1, 1), padding, (1, 1), False, (0, 0), C, (True, False, False)
    )[0]


def _weight_grad_by_strips(grad_y: Tensor, x: Tensor, kernel: tuple[int, int], wide: torch.dtype) -> Tensor:
    """`[1, C, *kernel]`, in the format that torch returned."""
    # One convolution for all images would have to copy x to [H, W, N * C] first, which costs more than it saves.
    C, H, W = x.shape[1:]
    grad_y, x = (value.contiguous(memory_format=torch.channels_last).to(wide) for value in (grad_y, x))
    rows = _rows_of_a_strip(H, W, kernel)
    total = x.new_zeros(1, *kernel, C).permute(0, 3, 1, 2)
    if rows == H:
        margin, padding = 0, (kernel[0] // 2, kernel[1] // 2)
    else:
        margin, padding = kernel[0] // 2, (0, kernel[1] // 2)
        x = _with_rows_of_zeros(x, margin)
    for n in range(len(x)):
        for top in range(0, H, rows):
            # Slices, not views with new dimensions: only slices keep strides that torch reads as channels_last.
            strip = grad_y[n, :, top : top + rows].reshape(C, 1, -1, W)
            near = x[n : n + 1, :, top : top + strip.shape[2] + 2 * margin]
            total += F.conv2d(near, strip, padding=padding, groups=C)
    return total


def _rows_of_a_strip(height: int, width: int, kernel: tuple[int, int]) -> int:
    """Rows of the output gradient that are a kernel at a time; all of them where they stay in the cache together.

    With 16 channels of a large map as the kernel, each of its taps comes from the second-level cache for a few outputs
    only. Strips cost extra work on rows of zeros, which tall kernels on low maps and thin ones do not earn back.
    """
    if height * width <= 2048 or min(kernel) < 9 or 3 * kernel[0] > 2 * height:
        return height
    return -(-height // -(-height // min(28, max(8, 1400 // width))))


def _with_rows_of_zeros(x: Tensor, margin: int) -> Tensor:
    """x in channels_last with so many rows of zeros above and below; one copy whatever its format."""
    N, C, H, W = x.shape
    padded = x.new_empty(N, H + 2 * margin, W, C).permute(0, 3, 1, 2)
    padded[:, :, :margin] = 0
    padded[:, :, margin + H :] = 0
    padded[:, :, margin : margin + H] = x
    return padded
