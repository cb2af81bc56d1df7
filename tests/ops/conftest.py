"""The oracle and the one table of tolerances of the operator's tests."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from replknet.ops import _cpu, _decided, _dispatch, depthwise_conv2d_fft

# Largest |error| over largest |value|, against float64 on the same inputs. Measured on a CPU over 300 random shapes a
# dtype (60 for float64), kernels up to 63x63; at most 1.2e-14, 1.6e-6, 3.9e-3 and 4.7e-4. The factor of two or three
# left is for the order of summation on other machines.
TOLERANCE = {torch.float64: 3e-14, torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# Tensor cores cut the low bits of float32 sums off instead of rounding them. Measured on an H100 over 150 random
# shapes: 4.6e-6 at most, in a weight gradient.
TOLERANCE_CUDA = {**TOLERANCE, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def true_float32():
    """float32 means float32 in these tests; torch allows TF32 in convolutions unless told otherwise."""
    # The flag of old for all of cuDNN: with the new one for convolutions alone, torch.export refuses to read either.
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


def relative_error(got: Tensor, exact: Tensor, least: float = 0.0) -> float:
    """Largest absolute error over the largest absolute value, at least `least`; NaN counts as infinite."""
    if exact.numel() == 0:
        return 0.0
    scale = max(exact.abs().max().item(), least) or 1.0
    error = (got.double() - exact).abs().max().item() / scale
    return float("inf") if error != error else error


def value_and_grads(run: Callable[..., Tensor], x, w, b, g) -> dict[str, Tensor]:
    """y, dx, dw and db of `run(x, w, b)` under the output gradient g."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    b = None if b is None else b.detach().requires_grad_()
    y = run(x, w, b)
    inputs = (x, w) if b is None else (x, w, b)
    grads = torch.autograd.grad(y, inputs, g)
    return dict(zip(("y", "dx", "dw", "db"), (y.detach(), *grads), strict=False))


def make_inputs(n, c, h, w, kh, kw, dtype, device, *, channels_last=False, bias=True, seed=0):
    """Random x, weight, bias and output gradient, drawn on the CPU so that every device sees the same numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    x, weight, b, g = draw(n, c, h, w), draw(c, 1, kh, kw), draw(c) if bias else None, draw(n, c, h, w)
    if channels_last:
        x, g = x.contiguous(memory_format=torch.channels_last), g.contiguous(memory_format=torch.channels_last)
    return x, weight, b, g


def check(run, x, w, b, g, *, activation=None, tolerance=None) -> dict[str, Tensor]:
    """Compare values and gradients of `run(x, w, b)` with the oracle; returns what was got."""
    got = value_and_grads(run, x, w, b, g)
    wide = [None if value is None else value.double().cpu() for value in (x, w, b, g)]

    def exactly(x, w, b):
        y = depthwise_conv2d_fft(x, w, b)
        # Rounding may move a value across zero, where the gradient jumps: the oracle takes the mask of what was got.
        return y if activation is None else y.where(positive, 0.0)

    positive = got["y"].cpu() > 0
    exact = value_and_grads(exactly, *wide)
    table = TOLERANCE_CUDA if x.is_cuda else TOLERANCE
    bound = table[x.dtype] if tolerance is None else tolerance
    for name, value in got.items():
        assert value.dtype == x.dtype, name
        assert value.shape == exact[name].shape, name
        # A single sum of standard normal terms may cancel to nothing; its terms are what rounding is relative to.
        least = (x.numel() / x.shape[1]) ** 0.5 if name in ("dw", "db") else 0.0
        error = relative_error(value.cpu(), exact[name], least)
        assert error <= bound, f"{name}: relative error {error:.2e} > {bound:.0e}"
    return got


@pytest.fixture
def oracle():
    """The helpers above, for test modules, which cannot import one another."""

    class Oracle:
        pass

    for helper in (check, make_inputs, relative_error, value_and_grads):
        setattr(Oracle, helper.__name__, staticmethod(helper))
    Oracle.tolerance = TOLERANCE
    return Oracle


@pytest.fixture
def instructions(monkeypatch):
    """Makes the choices on a CPU those for "avx512" or "avx2"; whatever the processor, all of torch's kernels run."""

    def forget() -> None:
        _cpu.form_of.cache_clear()
        _dispatch._choose.cache_clear()
        _decided.clear()

    def set_to(name: str) -> None:
        monkeypatch.setattr(_cpu, "has_avx512", lambda: name == "avx512")
        forget()

    yield set_to
    monkeypatch.undo()
    forget()
