"""1x1 convolutions as matrix products: values, gradients and memory formats."""

import pytest
import torch
from torch import nn

from replknet.layers import PointwiseConv2d
from replknet.layers.cnhw_conv2d import CnhwConv2d, as_cnhw
from replknet.layers.pointwise_conv2d import StridedPointwiseConv2d
from replknet.ops import is_cnhw

FORMATS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "cnhw": as_cnhw,
    "neither": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


def pair(*args, kind: type[PointwiseConv2d] = PointwiseConv2d, **kwargs) -> tuple[nn.Conv2d, PointwiseConv2d]:
    torch.manual_seed(0)
    own = kind(*args, **kwargs, dtype=torch.float64)
    plain = nn.Conv2d(*args, **kwargs, dtype=torch.float64)
    plain.load_state_dict(own.state_dict())
    return plain, own


def results(layer: nn.Conv2d, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(y.shape, dtype=y.dtype, generator=generator)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], grad)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("size", [(3, 5, 4, 7), (1, 5, 1, 1), (2, 5, 1, 3), (0, 5, 2, 2)], ids=str)
def test_equals_the_convolution(size, form, bias):
    plain, own = pair(5, 6, 1, bias=bias)
    x = FORMATS[form](torch.randn(size, dtype=torch.float64))
    for got, want in zip(results(own, x), results(plain, x), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("form", ["contiguous", "channels_last", "cnhw"])
def test_keeps_the_memory_format(form):
    x = FORMATS[form](torch.randn(3, 5, 4, 7))
    y = PointwiseConv2d(5, 6, 1)(x)
    assert y.stride() == FORMATS[form](torch.empty(3, 6, 4, 7)).stride()


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 1}, {"groups": 2}, {"padding": "same"}], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
def test_everything_else_is_torchs_convolution(kernel, options):
    plain, own = pair(4, 6, kernel, **options)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert torch.equal(own(x), plain(x)) or (kernel, options) == (1, {"padding": "same"})
    torch.testing.assert_close(own(x), plain(x))
    torch.testing.assert_close(own(x[0]), plain(x[0]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("stride", [2, (1, 3), (4, 2)], ids=str)
@pytest.mark.parametrize("size", [(3, 5, 4, 7), (1, 5, 1, 1), (0, 5, 2, 2)], ids=str)
def test_strides_pick_the_pixels_of_a_product(size, stride, form, bias):
    plain, own = pair(5, 6, 1, kind=StridedPointwiseConv2d, stride=stride, bias=bias)
    x = FORMATS[form](torch.randn(size, dtype=torch.float64))
    for got, want in zip(results(own, x), results(plain, x), strict=True):
        torch.testing.assert_close(got, want)
    assert own(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("options", [{"padding": 1}, {"groups": 2}], ids=str)
def test_other_strided_convolutions_are_torchs(options):
    plain, own = pair(4, 6, 1, kind=StridedPointwiseConv2d, stride=2, **options)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert torch.equal(own(x), plain(x))
    torch.testing.assert_close(own(x[0]), plain(x[0]))


def test_exports_as_a_convolution():
    program = torch.export.export(PointwiseConv2d(4, 6, 1).eval(), (torch.randn(2, 4, 5, 5),))
    assert "aten.conv2d" in program.graph_module.code


def test_the_way_into_cnhw():
    torch.manual_seed(0)
    own = CnhwConv2d(3, 4, 3, padding=1)
    plain = nn.Conv2d(3, 4, 3, padding=1)
    plain.load_state_dict(own.state_dict())
    x = torch.randn(2, 3, 5, 6)
    assert is_cnhw(own(x))
    torch.testing.assert_close(own(x), plain(x))
    torch.testing.assert_close(own(x[0]), plain(x[0]))
