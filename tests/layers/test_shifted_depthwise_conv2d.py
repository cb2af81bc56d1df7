"""Strided depthwise convolutions as sums of shifted inputs: values, gradients, formats."""

import re

import pytest
import torch
from torch import nn

from replknet.layers.cnhw_conv2d import as_cnhw
from replknet.layers.shifted_depthwise_conv2d import ShiftedDepthwiseConv2d, why_not_shifted
from replknet.ops import is_cnhw


def pair(**kwargs) -> tuple[nn.Conv2d, ShiftedDepthwiseConv2d]:
    torch.manual_seed(0)
    own = ShiftedDepthwiseConv2d(6, 6, groups=6, dtype=torch.float64, **kwargs)
    plain = nn.Conv2d(6, 6, groups=6, dtype=torch.float64, **kwargs)
    plain.load_state_dict(own.state_dict())
    return plain, own


def results(layer: nn.Conv2d, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    grad = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], grad)]


@pytest.mark.parametrize("form", ["contiguous", "cnhw", "channels_last"])
@pytest.mark.parametrize("size", [(2, 6, 7, 8), (3, 6, 8, 5), (1, 6, 1, 1), (0, 6, 4, 4)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 3, "stride": (2, 1), "padding": (1, 2), "bias": False},
        {"kernel_size": (1, 3), "stride": 3, "padding": (0, 1)},
        {"kernel_size": 2, "stride": 2, "padding": 1},
    ],
    ids=str,
)
def test_equals_the_convolution(options, size, form):
    plain, own = pair(**options)
    x = torch.randn(size, dtype=torch.float64)
    if form != "contiguous":
        x = as_cnhw(x) if form == "cnhw" else x.contiguous(memory_format=torch.channels_last)
    assert why_not_shifted(own) is None
    for got, want in zip(results(own, x), results(plain, x), strict=True):
        torch.testing.assert_close(got, want)
    assert is_cnhw(own(x)) == (form == "cnhw" and size[0] > 1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kernel_size": 3, "padding": 1}, "a kernel of its own"),
        ({"kernel_size": 5, "stride": 2, "padding": 2}, "kernel 5x5"),
        ({"kernel_size": 3, "stride": 2, "dilation": 2}, r"dilation \(2, 2\)"),
        ({"kernel_size": 3, "stride": 2, "padding": 1, "padding_mode": "circular"}, "circular"),
    ],
)
def test_everything_else_runs_as_before(options, reason):
    plain, own = pair(**options)
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(own(x), plain(x))
    assert re.search(reason, why_not_shifted(own) or "")


def test_activation_and_half_precision():
    plain, own = pair(kernel_size=3, stride=2, padding=1)
    own.activation = "relu"
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(own(x), plain(x).relu())
    plain, own = plain.float(), own.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = own(x.float())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), plain(x.float()).relu(), rtol=2e-2, atol=2e-2)


def test_exports_as_a_convolution():
    _, own = pair(kernel_size=3, stride=2, padding=1)
    program = torch.export.export(own.eval(), (torch.randn(2, 6, 5, 5, dtype=torch.float64),))
    assert "aten.conv2d" in program.graph_module.code


@pytest.mark.slow
@pytest.mark.parametrize("form", ["contiguous", "cnhw", "channels_last"])
def test_compiled(form):
    torch._dynamo.reset()
    plain, own = pair(kernel_size=3, stride=2, padding=1)
    x = torch.randn(3, 6, 9, 8, dtype=torch.float64)
    if form != "contiguous":
        x = as_cnhw(x) if form == "cnhw" else x.contiguous(memory_format=torch.channels_last)
    own.compile(fullgraph=True)
    for got, want in zip(results(own, x), results(plain, x), strict=True):
        torch.testing.assert_close(got, want)
