"""Recomputing activations changes neither gradients nor statistics."""

import copy

import pytest
import torch
from torch import nn

from replknet.layers import RepLKBlock
from replknet.layers.activation_checkpoint import checkpointed


@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_step_moves_statistics_once(momentum, trained):
    torch.manual_seed(0)
    plain = trained(RepLKBlock(6, 5, 3)).train()
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = momentum
    spare = copy.deepcopy(plain)
    x = torch.randn(4, 6, 7, 7)
    plain(x).square().sum().backward()
    checkpointed(spare, x).square().sum().backward()
    buffers = dict(spare.named_buffers())
    for name, value in plain.named_buffers():
        assert torch.equal(buffers[name], value), name
    for (name, want), got in zip(plain.named_parameters(), spare.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, msg=name)
    assert any(value.item() == 1 for name, value in buffers.items() if name.endswith("num_batches_tracked"))


def test_buffers_are_the_same_objects_afterwards():
    block = RepLKBlock(4, 5, 3)
    before = [id(buffer) for buffer in block.buffers()]
    checkpointed(block, torch.randn(2, 4, 6, 6, requires_grad=True)).sum().backward()
    assert [id(buffer) for buffer in block.buffers()] == before


def test_without_gradients_nothing_is_recomputed():
    calls = []
    module = nn.Conv2d(1, 1, 1)
    module.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        checkpointed(module, torch.ones(1, 1, 2, 2))
    assert calls == [1]
