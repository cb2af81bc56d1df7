"""The structure of a module without its data."""

import copy
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def empty_copy(module: Module) -> Module:
    """A deep copy whose parameters and buffers lie on the meta device; never holds a second set of data."""
    memo: dict[int, object] = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in module.buffers()}
    for parameter in module.parameters():
        data = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
    return copy.deepcopy(module, memo)
