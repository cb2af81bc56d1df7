import pytest
import torch
from torch import nn

from replknet.compat import DepthWiseConv2dImplicitGEMM


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", [13, (51, 5)], ids=str)
def test_constructor_and_values_of_the_original(kernel, bias):
    torch.manual_seed(0)
    layer = DepthWiseConv2dImplicitGEMM(6, kernel, bias=bias)
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    plain = nn.Conv2d(6, 6, size, padding=tuple(k // 2 for k in size), groups=6, bias=bias)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 16, 14)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)


def test_bias_is_off_unless_asked_for():
    assert DepthWiseConv2dImplicitGEMM(4, 7).bias is None


def test_even_kernels_are_refused():
    with pytest.raises(ValueError, match="given 4"):
        DepthWiseConv2dImplicitGEMM(4, 4)
