"""The GELU whose output compiled training does not keep."""

import copy

import pytest
import torch
from torch import nn

from replknet.layers.recomputed_gelu import RecomputedGELU


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_values_and_gradients_are_those_of_gelu(approximate):
    plain = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(approximate), nn.Linear(16, 4)).double()
    ours = copy.deepcopy(plain)
    ours[2].__class__ = RecomputedGELU
    compiled = torch.compile(copy.deepcopy(ours), backend="aot_eager", fullgraph=True)
    x = torch.randn(12, 8, dtype=torch.float64)
    for model in (plain, ours, compiled):
        model(x).square().sum().backward()
    for model in (ours, compiled):
        for mine, right in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, right.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(compiled.state_dict(), {f"_orig_mod.{k}": v for k, v in plain.state_dict().items()})


def test_state_dict_is_empty():
    assert RecomputedGELU().state_dict() == {}
