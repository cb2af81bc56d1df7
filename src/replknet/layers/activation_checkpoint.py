"""Activation checkpointing that leaves batch norm statistics alone while it recomputes."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def checkpointed(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, storing only `x` and recomputing the rest in backward.

    The recomputation normalises with the same batch statistics but updates throw-away copies of the running ones:
    one training step moves them once, as without checkpointing.
    """
    if not torch.is_grad_enabled():
        return module(x)
    if torch.compiler.is_compiling():
        # A compiler decides per value what to compute again, and moves statistics once in any case.
        return checkpoint(module, x, use_reentrant=False)  # type: ignore[return-value]

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _spare_statistics(module)

    y = checkpoint(module, x, use_reentrant=False, context_fn=contexts)
    assert isinstance(y, Tensor)
    return y


@contextmanager
def _spare_statistics(module: nn.Module) -> Iterator[None]:
    kept = [
        (norm, name, buffer)
        for norm in module.modules()
        if norm.training
        for name in _STATISTICS
        if isinstance(buffer := norm._buffers.get(name), Tensor)
    ]
    for norm, name, buffer in kept:
        norm._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for norm, name, buffer in kept:
            norm._buffers[name] = buffer
