import copy

import pytest
import torch
from torch import nn

from replknet.layers import DepthwiseConv2d


def pair(*args, **kwargs):
    torch.manual_seed(0)
    plain = nn.Conv2d(*args, **kwargs)
    ours = DepthwiseConv2d(*args, **kwargs)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


# Keyword arguments beside 6 channels and groups=6, and what `explain` must say about them.
LAYERS = {
    "same": ({"kernel_size": 7, "padding": 3}, "forward: "),
    "same, by word": ({"kernel_size": (5, 9), "padding": "same"}, "forward: "),
    "rectangular": ({"kernel_size": (3, 11), "padding": (1, 5), "bias": False}, "forward: "),
    "1x1, valid": ({"kernel_size": 1, "padding": "valid"}, "forward: "),
    "stride": ({"kernel_size": 3, "padding": 1, "stride": 2}, "stride (2, 2)"),
    "dilation": ({"kernel_size": 3, "padding": 2, "dilation": 2}, "dilation (2, 2)"),
    "even": ({"kernel_size": 4, "padding": 2}, "even kernel 4x4"),
    "even, by word": ({"kernel_size": 4, "padding": "same"}, "even kernel 4x4"),
    "valid": ({"kernel_size": 5}, 'padding (0, 0) where "same" is (2, 2)'),
    "reflect": ({"kernel_size": 5, "padding": 2, "padding_mode": "reflect"}, "padding mode reflect"),
    "circular": ({"kernel_size": 5, "padding": "same", "padding_mode": "circular"}, "padding mode circular"),
    "multiplier": ({"out_channels": 12, "kernel_size": 5, "padding": 2}, "12 output channels for 6 input"),
    "larger than 63": ({"kernel_size": (65, 1), "padding": (32, 0)}, "forward: "),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_is_a_drop_in_conv2d(name, channels_last, device):
    kwargs, said = LAYERS[name]
    plain, ours = (layer.to(device) for layer in pair(6, **{"out_channels": 6, "groups": 6} | kwargs))
    x = torch.randn(2, 6, 12, 10, generator=torch.Generator().manual_seed(1)).to(device)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    expected, got = plain(x), ours(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    got.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-4)
    assert said in ours.explain(x)
    torch.testing.assert_close(ours(x[0]), plain(x[0]), rtol=1e-5, atol=1e-5)
    assert list(ours.state_dict()) == list(plain.state_dict())


def test_groups_that_are_not_depthwise_are_refused():
    with pytest.raises(ValueError, match="groups=1 and in_channels=8"):
        DepthwiseConv2d(8, 8, 3)


def test_copies_and_moves_like_any_module():
    layer = DepthwiseConv2d(4, 4, 5, padding=2, groups=4)
    twin = copy.deepcopy(layer).double().to(memory_format=torch.channels_last)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(twin(x.double()).float(), layer(x))


def test_dtype_mismatch_says_both():
    layer = DepthwiseConv2d(4, 4, 5, padding=2, groups=4)
    with pytest.raises(ValueError, match=r"x is torch.float16, weight is torch.float32"):
        layer(torch.zeros(1, 4, 8, 8).half())
