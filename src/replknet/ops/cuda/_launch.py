"""Loading a compiled kernel on a GPU and launching it on torch's current stream."""

import ctypes
import functools
import importlib
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from replknet.ops.cuda._compile import compile_kernel

_LOCK = threading.Lock()


@dataclass(frozen=True)
class Launch:
    """Everything about a launch but its arguments."""

    sources: tuple[str, ...]
    expression: str
    grid: tuple[int, int, int]
    block: int
    shared_bytes: int


@dataclass(frozen=True)
class Gpu:
    """What a plan needs to know of a GPU.

    Attributes:
        arch: e.g. "sm_90a".
        multiprocessors: how many there are.
        shared_bytes: shared memory that a block can have.
        clusters: whether blocks can reach each other's shared memory, in clusters.
    """

    arch: str
    multiprocessors: int
    shared_bytes: int
    clusters: bool = False


@functools.cache
def gpu_of(index: int) -> Gpu:
    """The GPU with this device index."""
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or 99 * 1024
    driver = importlib.import_module("cuda.bindings.driver")
    status, clusters = driver.cuDeviceGetAttribute(driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH, index)
    clusters = status == driver.CUresult.CUDA_SUCCESS and bool(clusters)
    # From sm_90 on some instructions are an architecture's own ("a").
    arch = f"sm_{properties.major}{properties.minor}{'a' if properties.major >= 9 else ''}"
    return Gpu(arch, properties.multi_processor_count, shared, clusters)


def launch(plan: Launch, device: torch.device, *arguments: Tensor | int | None) -> None:
    """Launch on the current stream of `device`.

    Args:
        plan: the launch.
        device: where all tensors are.
        arguments: tensors and None become pointers; an int becomes a 64-bit integer, from whose low half a kernel
            reads an `int`.

    Raises:
        RuntimeError: the driver refused the launch.
    """
    driver = importlib.import_module("cuda.bindings.driver")
    values = (ctypes.c_int64 * len(arguments))(
        *(a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in arguments)
    )
    base = ctypes.addressof(values)
    pointers = (ctypes.c_void_p * len(arguments))(*(base + 8 * i for i in range(len(arguments))))
    index = device.index if device.index is not None else torch.cuda.current_device()
    with torch.cuda.device(index):
        kernel = _kernel(plan.sources, plan.expression, plan.shared_bytes, index)
        stream = torch.cuda.current_stream().cuda_stream

        def attempt():
            (status,) = driver.cuLaunchKernel(
                kernel, *plan.grid, plan.block, 1, 1, plan.shared_bytes, stream, ctypes.addressof(pointers), 0
            )
            return status

        status = attempt()
        if status == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
            _make_current(index)
            status = attempt()
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"launch of {plan.expression} failed: {status.name}; grid {plan.grid}, {plan.block} threads")


def _make_current(index: int) -> None:
    """Give this thread the context of a GPU that torch works in.

    A thread that has called nothing of CUDA's runtime yet has none, and the driver, unlike the runtime, does not help
    itself: autograd's thread is one when a backward pass begins with this operator.
    """
    driver = importlib.import_module("cuda.bindings.driver")
    (status,) = driver.cuCtxSetCurrent(_context(index))
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the context of CUDA device {index} cannot be made current: {status.name}")


@functools.cache
def _context(index: int):
    """The primary context of a GPU, kept for the life of the process."""
    driver = importlib.import_module("cuda.bindings.driver")
    status, context = driver.cuDevicePrimaryCtxRetain(driver.CUdevice(index))
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA device {index} gives no context: {status.name}")
    return context


@functools.cache
def _library(sources: tuple[str, ...], expression: str, arch: str):
    """The loaded kernel, good in every context; kept for the life of the process."""
    compiled = compile_kernel(sources, expression, arch)
    code = importlib.import_module("cuda.core").ObjectCode.from_cubin(compiled.cubin, name=expression)
    return code, code.get_kernel(compiled.symbol)


@functools.cache
def _kernel(sources: tuple[str, ...], expression: str, shared_bytes: int, index: int):
    driver = importlib.import_module("cuda.bindings.driver")
    with _LOCK:
        _make_current(index)
        _, kernel = _library(sources, expression, gpu_of(index).arch)
        handle = int(kernel.handle)
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        largest = _LARGEST.get((handle, index), 48 * 1024)
        if shared_bytes > largest:
            (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, driver.CUkernel(handle), index)
            if status != driver.CUresult.CUDA_SUCCESS:
                raise RuntimeError(f"{expression} cannot have {shared_bytes} bytes of shared memory: {status.name}")
            _LARGEST[handle, index] = shared_bytes
    return driver.CUfunction(handle)


_LARGEST: dict[tuple[int, int], int] = {}
