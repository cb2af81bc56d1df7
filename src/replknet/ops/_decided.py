"""What a call on a CPU came to run before, so that the same call runs it at once.

Checks, the choice and an operator written in Python take 10 to 50 us, as long as small convolutions do. The key holds
all that they depend on; `REPLKNET_AUTOTUNE` is read at a call's first time. Compilers, tracers, transforms, dispatch
modes and autocast have to see a call, and inside `autotune()` there is something to measure: such calls have no key.
Subclasses of Tensor are not decided here at all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from replknet.ops import _tuning
from replknet.ops._dispatch import choose, implementation
from replknet.ops._problem import PASSES, Pass, dense_strides, is_cnhw, problem_of

Run = Callable[..., Tensor]

_decided: dict[tuple | None, Run] = {}
_MOST_KEPT = 4096
_PLAIN = (Tensor, torch.nn.Parameter)
# Bound once: every look-up of an attribute shows in the smallest calls.
_are_transforms_active = torch._C._are_functorch_transforms_active
_count_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_autocast_enabled = torch._C._is_any_autocast_enabled
_is_tracing = torch._C._is_tracing
_is_grad_enabled = torch.is_grad_enabled

run_of = _decided.get
clear = _decided.clear


def key_of(
    pass_: Pass, first: Tensor, second: Tensor, bias: Tensor | None, option: object, backend: str
) -> tuple | None:
    """All that the outcome of a call depends on; None where it has to take the long way.

    Args:
        pass_: the pass.
        first: x, or the output gradient.
        second: the weight, or x.
        bias: of the forward pass.
        option: the activation, or the kernel `(Kh, Kw)` of the weight gradient.
        backend: as in `depthwise_conv2d`.
    """
    if (
        not first.is_cpu
        or torch.compiler.is_compiling()
        or _are_transforms_active()
        or _count_dispatch_modes()
        or _is_autocast_enabled()
        or _is_tracing()
        or _tuning._inside
    ):
        return None
    gradient = _is_grad_enabled() and (
        first.requires_grad or second.requires_grad or (bias is not None and bias.requires_grad)
    )
    return (
        pass_,
        first.shape,
        first.stride(),
        first.dtype,
        type(first),
        second.shape,
        second.stride(),
        second.dtype,
        second.is_cpu,
        type(second),
        None if bias is None else (bias.shape, bias.dtype, bias.is_cpu, type(bias)),
        gradient,
        option,
        backend,
    )


def decide(
    key: tuple | None, pass_: Pass, tensors: tuple[Tensor, ...], kernel: tuple[int, int], backend: str
) -> Run | None:
    """The backend's function for a checked call, kept for the next call with this key; None for the long way.

    The long way copies tensors to another format, and shows autograd and subclasses the operator.

    Args:
        key: of `key_of`.
        pass_: the pass.
        tensors: x and the weight, the output gradient and the weight, or the output gradient and x.
        kernel: `(Kh, Kw)`.
        backend: as in `depthwise_conv2d`.
    """
    if key is None or not _runs_as_it_is(pass_, *tensors[:2]) or any(type(value) not in _PLAIN for value in tensors):
        return None
    problem = problem_of(tensors[0], kernel)
    choice = choose(pass_, problem, backend)
    gradient = torch.is_grad_enabled() and any(value.requires_grad for value in tensors)
    # torch's own convolution brings torch's own gradients.
    if gradient and (pass_ != "forward" or any(choose(each, problem, backend).backend != "torch" for each in PASSES)):
        return None
    if len(_decided) >= _MOST_KEPT:
        clear()
    run = _decided[key] = getattr(implementation(choice.backend), pass_)
    return run


def _runs_as_it_is(pass_: Pass, first: Tensor, second: Tensor) -> bool:
    if first.numel() == 0 or is_cnhw(first) or first.stride() != dense_strides(first):
        return False
    return second.stride() == first.stride() if pass_ == "weight_grad" else second.is_contiguous()
