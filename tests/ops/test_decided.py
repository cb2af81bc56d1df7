"""Calls that have run before: the same results, the same errors, and everything that has to see a call sees it."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from replknet.ops import _decided, _library, autotune, depthwise_conv2d
from replknet.ops._problem import in_format_of


@pytest.fixture(autouse=True)
def nothing_decided():
    _decided.clear()
    yield
    _decided.clear()


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def key(x, w, b=None, activation=None):
    return _decided.key_of("forward", x, w, b, activation, "auto")


@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (15, 15)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_the_second_call_is_decided_and_gives_the_same(kernel, channels_last, activation):
    form = torch.channels_last if channels_last else torch.contiguous_format
    x, g = (draw(2, 64, 20, 18, seed=seed).contiguous(memory_format=form) for seed in (0, 1))
    w, b = draw(64, 1, *kernel, seed=2), draw(64, seed=3)
    calls = {
        "y": lambda: depthwise_conv2d(x, w, b, activation=activation),
        "dx": lambda: _library.input_grad(g, w, "auto"),
        "dw": lambda: _library.weight_grad(g, x, *kernel, "auto"),
    }
    for name, call in calls.items():
        first = call()
        kept = len(_decided._decided)
        second = call()
        assert torch.equal(first, second)
        assert len(_decided._decided) == kept > 0
        assert name == "dw" or second.stride() == x.stride()
    assert len(_decided._decided) == 3


@pytest.mark.parametrize("kernel", [3, 15])
def test_another_call_is_decided_anew(kernel):
    x, w = draw(1, 64, 16, 16), draw(64, 1, kernel, kernel)
    depthwise_conv2d(x, w)
    padding = kernel // 2
    for other in (x.double(), in_format_of(x, torch.empty_like(x, memory_format=torch.channels_last)), x[:, :, :9]):
        weight = w.to(other.dtype)
        torch.testing.assert_close(
            depthwise_conv2d(other, weight), F.conv2d(other, weight, padding=padding, groups=64), rtol=1e-4, atol=1e-4
        )


def test_errors_stay_after_a_good_call():
    x, w, b = draw(1, 8, 9, 9), draw(8, 1, 3, 3), draw(8)
    depthwise_conv2d(x, w, b)
    with pytest.raises(ValueError, match=r"weight is torch\.float64"):
        depthwise_conv2d(x, w.double(), b)
    with pytest.raises(ValueError, match=r"bias is torch\.float64"):
        depthwise_conv2d(x, w, b.double())
    with pytest.raises(ValueError, match="activation must be"):
        depthwise_conv2d(x, w, b, activation="gelu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight is on meta"):
        depthwise_conv2d(x, w.to("meta"))


def test_gradients_come_after_a_call_without():
    x, w = draw(1, 8, 20, 20), draw(8, 1, 15, 15)
    depthwise_conv2d(x, w)
    assert depthwise_conv2d(x, w.requires_grad_()).requires_grad
    with torch.no_grad():
        assert not depthwise_conv2d(x, w).requires_grad
    b = draw(8).requires_grad_()
    depthwise_conv2d(x, w.detach(), b).sum().backward()
    torch.testing.assert_close(b.grad, torch.full((8,), 400.0))


def test_who_has_to_see_a_call_sees_it():
    x, w = draw(1, 8, 20, 20), draw(8, 1, 15, 15)
    depthwise_conv2d(x, w)
    with FlopCounterMode(display=False) as counter:
        depthwise_conv2d(x, w)
    assert counter.get_total_flops() == 2 * x.numel() * 225
    with torch.autocast("cpu", torch.bfloat16):
        assert depthwise_conv2d(x, w).dtype == torch.bfloat16
        assert key(x, w) is None
    with autotune():
        assert key(x, w) is None
    assert torch.func.vmap(lambda value: depthwise_conv2d(value, w))(x[None]).shape == (1, *x.shape)
    assert key(x, w) is not None


class Marked(torch.Tensor):
    """A subclass with nothing of its own."""


def test_subclasses_are_not_decided():
    x, w = draw(1, 8, 9, 9).as_subclass(Marked), draw(8, 1, 3, 3)
    assert isinstance(depthwise_conv2d(x, w), torch.Tensor)
    assert not _decided._decided


def test_what_is_kept_has_an_end(monkeypatch):
    monkeypatch.setattr(_decided, "_MOST_KEPT", 2)
    w = draw(8, 1, 3, 3)
    for height in range(3, 9):
        depthwise_conv2d(draw(1, 8, height, 5), w)
    assert len(_decided._decided) == 2
