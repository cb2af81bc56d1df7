import copy
import pickle

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations

import replknet
from replknet.layers import DepthwiseConv2d


class RectangularPair(nn.Module):
    """As in SLaK: two long thin kernels and a small square one, summed."""

    def __init__(self, channels: int):
        super().__init__()

        def unit(kh, kw):
            conv = nn.Conv2d(channels, channels, (kh, kw), padding=(kh // 2, kw // 2), groups=channels, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(channels))

        self.tall, self.wide, self.small = unit(51, 5), unit(5, 51), unit(5, 5)

    def forward(self, x):
        return self.tall(x) + self.wide(x) + self.small(x)


class DilatedBranches(nn.Module):
    """As in UniRepLKNet: a large kernel with dilated small ones beside it."""

    def __init__(self, channels: int):
        super().__init__()

        def conv(k, r):
            return nn.Conv2d(channels, channels, k, padding=r * (k - 1) // 2, dilation=r, groups=channels, bias=False)

        self.origin = conv(13, 1)
        self.branches = nn.ModuleList([conv(5, 1), conv(7, 2), conv(3, 3), conv(3, 4), conv(3, 5)])

    def forward(self, x):
        return self.origin(x) + sum(branch(x) for branch in self.branches)


def model_of(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 7, 4, stride=4), *parts, nn.Conv2d(7, 5, 1)).eval()


@pytest.mark.parametrize(
    ("name", "count"), [("convnext_atto", 12), ("inception_next_atto", 36), ("mobilenetv3_small_050", 7)]
)
def test_timm_models(name, count):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    before = copy.deepcopy(model)
    report = replknet.accelerate(model)
    assert len(report.replaced) == count
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(x), before(x), rtol=1e-4, atol=1e-5)
    for (key, value), (key_before, value_before) in zip(
        model.state_dict().items(), before.state_dict().items(), strict=True
    ):
        assert key == key_before
        assert torch.equal(value, value_before)


def test_slak_and_unireplknet_like_classes():
    torch.manual_seed(0)
    model = model_of(RectangularPair(7), DilatedBranches(7))
    before = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    report = replknet.accelerate(model)
    assert set(report.replaced) == {"1.tall.0", "1.wide.0", "1.small.0", "2.origin", "2.branches.0"}
    assert report.replaced["1.tall.0"] == "Conv2d 7, 51x5"
    assert report.left["2.branches.1"] == "dilation (2, 2)"
    assert report.left["0"] == "not depthwise (groups=1)"
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    x = torch.randn(2, 3, 64, 48)
    for mode in (False, True):
        got, expected = model.train(mode)(x), before.train(mode)(x)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    got.square().sum().backward()
    expected.square().sum().backward()
    for parameter, twin in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, twin.grad, rtol=1e-3, atol=1e-4)
    assert "replaced 5 of 11" in str(report)


def test_hooks_and_shared_modules_stay():
    shared = nn.Conv2d(4, 4, 5, padding=2, groups=4)
    calls = []
    shared.register_forward_hook(lambda module, inputs, output: calls.append(type(module).__name__))
    model = nn.Sequential(shared, nn.ReLU(), shared)
    report = replknet.accelerate(model)
    assert set(report.replaced) == {"0", "2"}
    assert model[0] is model[2] is shared
    model(torch.zeros(1, 4, 8, 8))
    assert calls == ["DepthwiseConv2d"] * 2


def test_what_is_left_says_why():
    def depthwise(**kwargs):
        return nn.Conv2d(4, 4, 3, padding=1, groups=4, **kwargs)

    class Scaled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    patched = depthwise()
    patched.forward = lambda x: x
    model = nn.ModuleDict(
        {
            "subclass": Scaled(4, 4, 3, padding=1, groups=4),
            "parametrized": parametrizations.weight_norm(depthwise()),
            "patched": patched,
            "lazy": nn.LazyConv2d(4, 3, padding=1, groups=4),
            "ours": DepthwiseConv2d(4, 4, 3, padding=1, groups=4),
            "one_d": nn.Conv1d(4, 4, 3, padding=1, groups=4),
            "transposed": nn.ConvTranspose2d(4, 4, 3, padding=1, groups=4),
            "plain": depthwise(),
        }
    )
    report = replknet.accelerate(model)
    assert list(report.replaced) == ["plain"]
    assert "Scaled" in report.left["subclass"]
    assert report.left["parametrized"] == "parametrized: weight"
    assert "patched" in report.left["patched"]
    assert "LazyConv2d" in report.left["lazy"]
    assert "already" in report.left["ours"]
    assert "not a 2-D convolution" in report.left["one_d"]
    assert "ConvTranspose2d" in report.left["transposed"]
    assert type(model["subclass"]) is Scaled


def test_twice_is_once_and_a_bare_convolution_works():
    conv = nn.Conv2d(4, 4, 7, padding=3, groups=4)
    assert replknet.accelerate(conv).replaced == {"": "Conv2d 4, 7x7"}
    assert replknet.accelerate(conv).replaced == {}
    assert type(pickle.loads(pickle.dumps(conv))) is DepthwiseConv2d


def test_only_modules():
    with pytest.raises(TypeError, match="given list"):
        replknet.accelerate([nn.Conv2d(4, 4, 3)])
