"""Fixtures for tests of modules."""

import pytest
import torch
from torch import nn


@pytest.fixture
def trained():
    """Gives norms and parameters the looks of training: statistics and affine maps far from their initial values."""

    def make(module: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)

        def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
            tensor.data.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

        for norm in module.modules():
            if getattr(norm, "running_mean", None) is None:
                continue
            uniform(norm.running_mean, -0.5, 0.5)
            uniform(norm.running_var, 0.3, 2.0)
            if norm.weight is not None:
                uniform(norm.weight, -1.5, 1.5)
                uniform(norm.bias, -0.5, 0.5)
        return module.eval()

    return make
