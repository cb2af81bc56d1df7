"""Convolutions with weights in oneDNN's layout: values, fallbacks, and what becomes of the packed weight."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from replknet.layers import packed_conv2d
from replknet.layers.packed_conv2d import PackedConv2d, why_not_packed

CASES = [
    (6, 8, {"kernel_size": 1}),
    (6, 6, {"kernel_size": 7, "padding": 3, "groups": 6}),
    (6, 6, {"kernel_size": 3, "padding": 1, "stride": 2, "groups": 6, "bias": False}),
    (6, 4, {"kernel_size": (3, 5), "padding": (1, 0), "dilation": 2, "groups": 2}),
    (3, 8, {"kernel_size": 3, "stride": 2, "padding": 1}),
    # Widened by columns of zeros.
    (6, 6, {"kernel_size": (3, 13), "padding": (1, 6), "groups": 6}),
    (6, 6, {"kernel_size": (1, 11), "padding": (0, 10), "dilation": 2, "stride": (1, 2), "groups": 6, "bias": False}),
]


def pair(channels: int, out: int, options: dict) -> tuple[nn.Conv2d, PackedConv2d]:
    torch.manual_seed(0)
    own = PackedConv2d(channels, out, **options).requires_grad_(False)
    plain = nn.Conv2d(channels, out, **options)
    plain.load_state_dict(own.state_dict())
    return plain.requires_grad_(False), own


@pytest.mark.parametrize("act", [None, nn.ReLU(), nn.GELU()], ids=str)
@pytest.mark.parametrize("size", [(2, 15, 14), (1, 9, 9), (0, 9, 9)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_convolution(case, size, act):
    plain, own = pair(*case)
    if act is not None:
        assert isinstance(own.absorb(act), nn.Identity)
    x = torch.randn(size[0], case[0], *size[1:])
    want = plain(x) if act is None else act(plain(x))
    for form in (torch.contiguous_format, torch.channels_last):
        torch.testing.assert_close(own(x.contiguous(memory_format=form)), want, rtol=1e-5, atol=1e-5)
    if size[0]:
        assert own._packed is not None
        torch.testing.assert_close(own(x[0]), want[0], rtol=1e-5, atol=1e-5)


def test_other_sizes_after_packing():
    plain, own = pair(*CASES[0])
    for size in ((1, 6, 14, 14), (8, 6, 1, 1), (3, 6, 50, 40)):
        x = torch.randn(size)
        torch.testing.assert_close(own(x), plain(x), rtol=1e-5, atol=1e-5)


def test_activations_that_it_has_no_kernel_for_stay():
    _, own = pair(*CASES[0])
    for act in (nn.GELU("tanh"), nn.SiLU(), nn.Identity()):
        assert own.absorb(act) is act
    own.absorb(nn.ReLU())
    second = nn.ReLU()
    assert own.absorb(second) is second


@pytest.mark.parametrize("case", [CASES[0], CASES[1]], ids=str)
def test_a_new_weight_is_packed_anew(case):
    plain, own = pair(*case)
    x = torch.randn(2, 6, 5, 5)
    own(x)
    for change in (
        lambda conv: conv.weight.mul_(2),
        lambda conv: setattr(conv, "weight", nn.Parameter(conv.weight + 1)),
        lambda conv: conv.bias.add_(1),
    ):
        with torch.no_grad():
            change(plain), change(own)
            torch.testing.assert_close(own(x), plain(x), rtol=1e-5, atol=1e-5)
    state = {name: value + 1 for name, value in plain.state_dict().items()}
    plain.load_state_dict(state), own.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(own(x), plain(x), rtol=1e-5, atol=1e-5)


def test_kernels_that_reach_past_the_map():
    plain, own = pair(6, 6, {"kernel_size": 31, "padding": 15, "groups": 6})
    x = torch.randn(2, 6, 7, 20)
    torch.testing.assert_close(own(x), plain(x), rtol=1e-5, atol=1e-5)
    assert own._packed is None


def test_gradients_are_torchs():
    plain, own = pair(*CASES[1])
    own.activation = "relu"
    x = torch.randn(2, 6, 9, 9, requires_grad=True)
    (got,) = torch.autograd.grad(own(x).sum(), x)
    (want,) = torch.autograd.grad(F.relu(plain(x)).sum(), x)
    torch.testing.assert_close(got, want)
    assert own._packed is None


@pytest.mark.parametrize("kernels", ["those of this processor", "float32 alone"])
def test_half_precision_and_autocast(kernels, monkeypatch):
    if kernels == "float32 alone":
        monkeypatch.setattr(packed_conv2d, "_dtypes", lambda: (torch.float32,))
    plain, own = pair(*CASES[0])
    x = torch.randn(2, 6, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert own(x).dtype == torch.bfloat16
    own.to(torch.bfloat16)
    assert ("no kernels for torch.bfloat16" in (why_not_packed(own) or "")) == (len(packed_conv2d._dtypes()) == 1)
    torch.testing.assert_close(own(x.bfloat16()).float(), plain(x), rtol=3e-2, atol=3e-2)


@pytest.mark.skipif(len(packed_conv2d._dtypes()) == 1, reason="oneDNN has no bfloat16 kernels on this processor")
@pytest.mark.parametrize("case", [case for case in CASES if case[2].get("groups") == case[0]], ids=str)
def test_depthwise_convolutions_of_bfloat16_are_float32s_rounded(case):
    plain, own = pair(*case)
    for conv in (plain, own):
        conv.to(torch.bfloat16)
    assert why_not_packed(own) is None
    x = torch.randn(2, 6, 9, 14, dtype=torch.bfloat16)
    got, want = own(x), plain.float()(x.float())
    assert own._packed is not None
    torch.testing.assert_close(got, want.bfloat16(), rtol=1e-2, atol=1e-6)


def test_copies_pickles_and_exports():
    plain, own = pair(*CASES[0])
    x = torch.randn(2, 6, 5, 5)
    own(x)
    for twin in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        torch.testing.assert_close(twin(x), plain(x), rtol=1e-5, atol=1e-5)
    assert "aten.conv2d" in torch.export.export(own.eval(), (x,)).graph_module.code


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 4, 1, dtype=torch.float64), "float64"),
        (nn.Conv2d(4, 4, 1, device="meta"), "meta"),
        (nn.Conv2d(4, 4, 3, padding="same"), "padding same"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "reflect"),
        (nn.Conv2d(4, 4, 13, groups=4), "a width of 13"),
        (nn.Conv2d(4, 4, 3, groups=2, dtype=torch.bfloat16), "half precision"),
    ],
)
def test_what_is_left_to_torch(conv, reason, monkeypatch):
    monkeypatch.setattr(packed_conv2d, "has_avx512", lambda: False)
    assert reason in (why_not_packed(conv) or "")
