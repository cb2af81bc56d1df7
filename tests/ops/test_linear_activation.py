"""The product with an epilogue: its numbers, and what compilers are told of it."""

import pytest
import torch
import torch.nn.functional as F

from replknet.ops import linear_activation

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", [(50, 24, 16), (1, 8, 8), (33, 7, 5)])
def test_against_float64(shape, dtype, activation, device):
    rows, inputs, outputs = shape
    x, weight = (
        torch.randn(rows, inputs, device=device).to(dtype),
        torch.randn(outputs, inputs, device=device).to(dtype),
    )
    bias = torch.randn(outputs, device=device).to(dtype)
    got = linear_activation(x, weight, bias, activation)
    want = {"relu": torch.relu, "gelu": F.gelu}[activation](F.linear(x.double(), weight.double(), bias.double()))
    assert got.dtype == dtype
    # On CUDA the kernel has the tanh form of GELU.
    limit = LIMITS[dtype] * want.abs().max().item() + (1e-3 if activation == "gelu" and x.is_cuda else 0)
    assert (got.double() - want).abs().max() <= limit


def test_what_compilers_are_told():
    x, weight, bias = torch.randn(6, 8), torch.randn(4, 8), torch.randn(4)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.replknet.linear_activation.default, (x, weight, bias, "gelu"), test_utils=checks)
    with pytest.raises(RuntimeError):
        linear_activation(x, weight[:, :5], bias, "relu")
