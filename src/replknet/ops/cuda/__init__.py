"""Tensor-core kernels for NVIDIA GPUs from sm_80 on, compiled by NVRTC at first use.

Nothing of the compiler or the driver is touched before the first call of `can_run`, `forward` or a gradient.
"""

import functools
import importlib.util

import torch
from torch import Tensor

from replknet.ops._problem import Pass
from replknet.ops.cuda import _plan
from replknet.ops.cuda._launch import Gpu, Launch, gpu_of, launch

_FLIP, _RELU = 1, 2


def can_run(
    x_shape: tuple[int, int, int, int],
    weight_shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    channels_last: bool,
    device: torch.device,
    pass_: Pass,
) -> str | None:
    """None where the kernels can run the pass, else the reason why not."""
    kh, kw = weight_shape[2:]
    if dtype not in _plan.DTYPES:
        return f"{dtype} has no tensor-core kernel; float16, bfloat16 and float32 have"
    if max(kh, kw) > _plan.LARGEST_KERNEL:
        return f"a {kh}x{kw} kernel is larger than {_plan.LARGEST_KERNEL}x{_plan.LARGEST_KERNEL}"
    if channels_last:
        return "channels_last has no tensor-core kernel"
    if (reason := _front_end()) is not None:
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the GPU is sm_{major}{minor}; the kernels need sm_80 or newer"
    n, c, h, w = (max(1, size) for size in x_shape)
    shape = _plan.Shape(n, c, h, w, kh, kw, dtype, 3 if dtype == torch.float32 else 1, 2)
    index = device.index if device.index is not None else torch.cuda.current_device()
    plan = _plan.default_weight_grad_tile if pass_ == "weight_grad" else _plan.default_forward_tile
    try:
        plan(shape, gpu_of(index))
    except NotImplementedError as error:
        return str(error)
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """The convolution.

    Args:
        x: `[N, C, H, W]`, contiguous.
        weight: `[C, 1, Kh, Kw]`, contiguous.
        bias: `[C]` or None.
        activation: None or "relu".

    Returns:
        `[N, C, H, W]` like x.
    """
    return _convolve(x, weight, bias, _RELU if activation == "relu" else 0)


def input_grad(grad_y: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the convolution to its input: the convolution of `grad_y` with the weight turned by 180 degrees."""
    return _convolve(grad_y, weight, None, _FLIP)


def weight_grad(grad_y: Tensor, x: Tensor, kh: int, kw: int) -> Tensor:
    """Gradient of the convolution to its weight, `[C, 1, kh, kw]` in x's dtype; two calls give the same bits."""
    n, c, h, w = x.shape
    out = torch.empty(c, 1, kh, kw, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out.zero_()
    plan, total = _weight_grad_launches(_shape(x, kh, kw, grad_y), x.device.index)
    partial = torch.empty(plan.splits, out.numel(), dtype=torch.float32, device=x.device)
    launch(
        plan.launch, x.device, x, grad_y, partial, n, c, h, w,
        x.stride(0), x.stride(1), grad_y.stride(0), grad_y.stride(1),
        plan.item_images, plan.item_rows, plan.x_stride, plan.y_stride,
    )  # fmt: skip
    launch(total, x.device, partial, out, plan.splits, out.numel())
    return out


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, flags: int) -> Tensor:
    n, c, h, w = x.shape
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    plan = _forward_launch(_shape(x, *weight.shape[2:], y), x.device.index)
    launch(
        plan.launch, x.device, x, weight, bias, y, n, c, h, w,
        x.stride(0), x.stride(1), y.stride(0), y.stride(1), plan.item_images, plan.item_rows, plan.stride, flags,
    )  # fmt: skip
    return y


def _shape(x: Tensor, kh: int, kw: int, other: Tensor) -> _plan.Shape:
    n, c, h, w = x.shape
    planes = 1 if x.dtype != torch.float32 else 2 if torch.backends.cudnn.conv.fp32_precision == "tf32" else 3
    address = x.data_ptr() | other.data_ptr() | w * x.element_size()
    return _plan.Shape(n, c, h, w, kh, kw, x.dtype, planes, min(16, address & -address))


@functools.lru_cache(maxsize=4096)
def _forward_launch(shape: _plan.Shape, index: int) -> _plan.ForwardPlan:
    return _plan.forward_plan(shape, gpu_of(index))


@functools.lru_cache(maxsize=4096)
def _weight_grad_launches(shape: _plan.Shape, index: int) -> tuple[_plan.WeightGradPlan, Launch]:
    expression = f"weight_grad_sum<{_plan.DTYPES[shape.dtype]}>"
    blocks = min(65535, -(-shape.c * shape.kh * shape.kw // 256))
    return _plan.weight_grad_plan(shape, gpu_of(index)), Launch(_plan.WEIGHT_GRAD, expression, (blocks, 1, 1), 256, 0)


@functools.cache
def _front_end() -> str | None:
    for name in ("cuda.core", "cuda.bindings"):
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"the package that provides {name} is not installed (pip install 'cuda-core[cu13]')"
    return None
