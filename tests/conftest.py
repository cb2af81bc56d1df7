"""Fixtures that every test may use."""

import os

# Before anything imports huggingface_hub: a test that reaches for the network fails at once, not after 45 s of retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import nn


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """Every device that a test should hold on: the CPU always, a GPU under the marker gpu."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; torch.cuda.is_available() is False here")
    return torch.device(request.param)


@pytest.fixture
def cuda() -> torch.device:
    """A CUDA device, for tests that are about CUDA only."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; torch.cuda.is_available() is False here")
    return torch.device("cuda")


@pytest.fixture
def poisoned():
    """Every `torch.empty` holds NaN, so that an element that is never written cannot pass for a right one."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(before)


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
