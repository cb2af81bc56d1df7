"""Kernels for NVIDIA GPUs from sm_80 on, compiled by NVRTC at first use: on tensor cores, but for small ones.

Contiguous and channels_last tensors run as they are; channels_last tiles that do not fit shared memory run on
contiguous copies, which `runs_natively` tells. Nothing of the compiler or the driver is touched before the first call
of `can_run`, `forward` or a gradient.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from replknet.ops._problem import Pass, Problem, is_channels_last
from replknet.ops.cuda import _plan, _plan_diagonal, _plan_direct
from replknet.ops.cuda import _plan_channels_last as _plan_cl
from replknet.ops.cuda._compile import compile_kernel
from replknet.ops.cuda._launch import Gpu, Launch, gpu_of, launch
from replknet.ops.cuda._plan import AnyTile

_FLIP, _RELU = 1, 2


def can_run(pass_: Pass, problem: Problem) -> str | None:
    """None where the kernels can run the pass, else the reason why not."""
    kh, kw = problem.kernel
    if problem.dtype not in _plan.DTYPES:
        return f"{problem.dtype} has no tensor-core kernel; float16, bfloat16 and float32 have"
    if max(kh, kw) > _plan.LARGEST_KERNEL:
        return f"a {kh}x{kw} kernel is larger than {_plan.LARGEST_KERNEL}x{_plan.LARGEST_KERNEL}"
    if (reason := _front_end()) is not None:
        return reason
    major, minor = torch.cuda.get_device_capability(problem.device)
    if major < 8:
        return f"the GPU is sm_{major}{minor}; the kernels need sm_80 or newer"
    shape, index = _nominal(problem), _index(problem.device)
    if problem.channels_last and _plan_direct.suits(shape, weight_grad=pass_ == "weight_grad"):
        return None
    plan = _plan.default_weight_grad_tile if pass_ == "weight_grad" else _plan.default_forward_tile
    try:
        plan(shape, gpu_of(index))
    except NotImplementedError as error:
        return str(error)
    return None


def runs_natively(problem: Problem) -> bool:
    """Whether channels_last tensors of this shape run without contiguous copies."""
    shape, index = _nominal(problem), _index(problem.device)
    try:
        if not _plan_direct.suits(shape, weight_grad=False):
            _plan_cl.forward_plan(shape, gpu_of(index))
        if not _plan_direct.suits(shape, weight_grad=True):
            _plan_cl.weight_grad_plan(shape, gpu_of(index))
    except NotImplementedError:
        return False
    return True


def tiles(pass_: Pass, problem: Problem) -> tuple[str, ...]:
    """Names of the tiles other than the default that are worth measuring; none where contiguous copies are made."""
    shape, index = _allocated(problem), _index(problem.device)
    plans = _plan_cl if problem.channels_last else _plan
    offer = plans.weight_grad_tiles if pass_ == "weight_grad" else plans.forward_tiles
    # Where the default is a kernel for small kernels, these are all others.
    gradient = pass_ == "weight_grad"
    small = _plan_direct.suits(shape, weight_grad=gradient) or (gradient and _plan_diagonal.suits(shape))
    first = 0 if problem.channels_last and small else 1
    try:
        return tuple(map(str, offer(shape, gpu_of(index))[first:]))
    except NotImplementedError:
        return ()


def compile_tiles(pass_: Pass, problem: Problem) -> None:
    """Compile the kernels of all `tiles`, several at once, into the disk cache; what fails fails again when it runs."""
    shape, index = _allocated(problem), _index(problem.device)

    def compile_one(tile: str) -> None:
        if pass_ == "weight_grad":
            plan = (_weight_grad_plan_channels_last if problem.channels_last else _weight_grad_plan)(shape, index, tile)
        elif problem.channels_last:
            plan = _forward_plan_channels_last(shape, index, 0, tile)
        else:
            plan = _forward_plan(shape, index, tile)
        if plan is not None:
            with contextlib.suppress(RuntimeError):
                compile_kernel(plan.launch.sources, plan.launch.expression, gpu_of(index).arch)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, tiles(pass_, problem)))


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, tile: str | None = None) -> Tensor:
    """The convolution.

    Args:
        x: `[N, C, H, W]`, contiguous, channels_last or CNHW.
        weight: `[C, 1, Kh, Kw]`, contiguous.
        bias: `[C]` or None.
        activation: None or "relu".
        tile: a name out of `tiles`; the default tile where it is None or not offered for this shape.

    Returns:
        `[N, C, H, W]` like x, in x's memory format.
    """
    bias = None if bias is None else bias.contiguous()
    return _convolve(x, weight, bias, _RELU if activation == "relu" else 0, tile)


def input_grad(grad_y: Tensor, weight: Tensor, tile: str | None = None) -> Tensor:
    """Gradient of the convolution to its input: the convolution of `grad_y` with the weight turned by 180 degrees."""
    return _convolve(grad_y, weight, None, _FLIP, tile)


def weight_grad(grad_y: Tensor, x: Tensor, kh: int, kw: int, tile: str | None = None) -> Tensor:
    """Gradient of the convolution to its weight, `[C, 1, kh, kw]` in x's dtype; two calls give the same bits.

    Args:
        grad_y, x: `[N, C, H, W]`, both contiguous or both channels_last.
        kh, kw: kernel size.
        tile: as in `forward`.
    """
    n, c, h, w = x.shape
    out = torch.empty(c, 1, kh, kw, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out.zero_()
    plan = None
    if is_channels_last(x):
        plan = _weight_grad_plan_channels_last(_shape_channels_last(x, kh, kw, grad_y), _index(x.device), tile)
    if isinstance(plan, _plan.SmallKernelPlan):
        sizes = plan.arguments
    elif plan is not None:
        sizes = (n, c, h, w, *plan.arguments)
    else:
        if is_channels_last(x):
            x, grad_y = x.contiguous(), grad_y.contiguous()
        plan = _weight_grad_plan(_shape(x, kh, kw, grad_y), _index(x.device), tile)
        strides = (x.stride(0), x.stride(1), grad_y.stride(0), grad_y.stride(1))
        sizes = (n, c, h, w, *strides, plan.item_images, plan.item_rows, plan.x_stride, plan.y_stride)
    partial = torch.empty(plan.splits, out.numel(), dtype=torch.float32, device=x.device)
    launch(plan.launch, x.device, x, grad_y, partial, *sizes)
    total = Launch(
        _plan.WEIGHT_GRAD,
        f"weight_grad_sum<{_plan.DTYPES[x.dtype]}>",
        (min(65535, -(-out.numel() // 256)), 1, 1),
        256,
        0,
    )
    launch(total, x.device, partial, out, plan.splits, out.numel())
    return out


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, flags: int, tile: str | None) -> Tensor:
    n, c, h, w = x.shape
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    kh, kw = weight.shape[2:]
    if not is_channels_last(x):
        _convolve_contiguous(x, weight, bias, y, flags, tile)
        return y
    plan = _forward_plan_channels_last(_shape_channels_last(x, kh, kw, y), _index(x.device), flags, tile)
    if isinstance(plan, _plan.SmallKernelPlan):
        launch(plan.launch, x.device, x, weight, bias, y, *plan.arguments)
    elif plan is not None:
        launch(plan.launch, x.device, x, weight, bias, y, n, c, h, w, *plan.arguments, flags)
    else:
        copy = torch.empty_like(x, memory_format=torch.contiguous_format)
        _convolve_contiguous(x.contiguous(), weight, bias, copy, flags, None)
        y.copy_(copy)
    return y


def _convolve_contiguous(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, flags: int, tile: str | None
) -> None:
    (n, c, h, w), (kh, kw) = x.shape, weight.shape[2:]
    plan = _forward_plan(_shape(x, kh, kw, y), _index(x.device), tile)
    strides = (x.stride(0), x.stride(1), y.stride(0), y.stride(1))
    item = (plan.item_images, plan.item_rows, plan.stride)
    launch(plan.launch, x.device, x, weight, bias, y, n, c, h, w, *strides, *item, flags)


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()


def _planes(dtype: torch.dtype) -> int:
    if dtype != torch.float32:
        return 1
    return 2 if torch.backends.cudnn.conv.fp32_precision == "tf32" else 3  # pyright: ignore[reportAttributeAccessIssue]


def _alignment(address: int) -> int:
    return min(16, address & -address)


def _nominal(problem: Problem) -> _plan.Shape:
    """The shape in its least favourable form: whatever can run it runs every tensor of this shape."""
    n, c, h, w = (max(1, size) for size in problem.x_shape)
    return _plan.Shape(n, c, h, w, *problem.kernel, problem.dtype, 3 if problem.dtype == torch.float32 else 1, 2)


def _allocated(problem: Problem) -> _plan.Shape:
    """The shape of newly allocated tensors."""
    n, c, h, w = (max(1, size) for size in problem.x_shape)
    align = _alignment((c if problem.channels_last else w) * problem.dtype.itemsize)
    return _plan.Shape(n, c, h, w, *problem.kernel, problem.dtype, _planes(problem.dtype), align)


def _named(
    tile: str | None, offer: Callable[[_plan.Shape, Gpu], tuple[AnyTile, ...]], shape: _plan.Shape, gpu: Gpu
) -> AnyTile | None:
    """The tile of this name among those offered; None, the default, where there is none, as for another shape's."""
    if tile is None:
        return None
    try:
        return {str(one): one for one in offer(shape, gpu)}.get(tile)
    except NotImplementedError:
        return None


def _shape(x: Tensor, kh: int, kw: int, other: Tensor) -> _plan.Shape:
    n, c, h, w = x.shape
    align = _alignment(x.data_ptr() | other.data_ptr() | w * x.element_size())
    return _plan.Shape(n, c, h, w, kh, kw, x.dtype, _planes(x.dtype), align)


def _shape_channels_last(x: Tensor, kh: int, kw: int, other: Tensor) -> _plan.Shape:
    n, c, h, w = x.shape
    align = _alignment(x.data_ptr() | other.data_ptr() | c * x.element_size())
    return _plan.Shape(n, c, h, w, kh, kw, x.dtype, _planes(x.dtype), align)


@functools.lru_cache(maxsize=4096)
def _forward_plan(shape: _plan.Shape, index: int, tile: str | None) -> _plan.ForwardPlan:
    gpu = gpu_of(index)
    return _plan.forward_plan(shape, gpu, _named(tile, _plan.forward_tiles, shape, gpu))


@functools.lru_cache(maxsize=4096)
def _weight_grad_plan(shape: _plan.Shape, index: int, tile: str | None) -> _plan.WeightGradPlan:
    gpu = gpu_of(index)
    return _plan.weight_grad_plan(shape, gpu, _named(tile, _plan.weight_grad_tiles, shape, gpu))


@functools.lru_cache(maxsize=4096)
def _forward_plan_channels_last(
    shape: _plan.Shape, index: int, flags: int, tile: str | None
) -> _plan.SmallKernelPlan | _plan_cl.ForwardPlan | None:
    gpu = gpu_of(index)
    try:
        named = _named(tile, _plan_cl.forward_tiles, shape, gpu)
        if named is None and _plan_direct.suits(shape, weight_grad=False):
            return _plan_direct.forward_plan(shape, gpu, flags)
        return _plan_cl.forward_plan(shape, gpu, named)
    except NotImplementedError:
        return None


@functools.lru_cache(maxsize=4096)
def _weight_grad_plan_channels_last(
    shape: _plan.Shape, index: int, tile: str | None
) -> _plan.SmallKernelPlan | _plan_cl.WeightGradPlan | None:
    gpu = gpu_of(index)
    try:
        named = _named(tile, _plan_cl.weight_grad_tiles, shape, gpu)
        if named is None and _plan_diagonal.suits(shape):
            return _plan_diagonal.weight_grad_plan(shape, gpu)
        if named is None and _plan_direct.suits(shape, weight_grad=True):
            return _plan_direct.weight_grad_plan(shape, gpu)
        return _plan_cl.weight_grad_plan(shape, gpu, named)
    except NotImplementedError:
        return None


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
