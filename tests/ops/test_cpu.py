"""Which of torch's kernels runs a pass on a CPU, by instruction set, and that every form computes it."""

import pytest
import torch

from replknet.ops import _cpu, _rearranged
from replknet.ops._dispatch import choose
from replknet.ops._problem import PASSES, Problem

CPU = torch.device("cpu")


def problem(n, c, h, w, kh, kw, *, dtype=torch.float32, channels_last=False):
    return Problem((n, c, h, w), (kh, kw), dtype, channels_last, CPU)


LARGE, SMALL = problem(8, 128, 56, 56, 31, 31), problem(8, 128, 56, 56, 3, 3)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("avx512", LARGE, ("rearranged", "rearranged", "rearranged")),
        ("avx512", SMALL, ("torch", "torch", "torch")),
        ("avx2", LARGE, ("rearranged", "torch", "rearranged")),
        ("avx2", SMALL, ("torch", "rearranged", "torch")),
    ],
)
def test_choices_for_a_large_and_a_small_kernel(name, given, expected, instructions):
    instructions(name)
    assert tuple(choose(pass_, given).backend for pass_ in PASSES) == expected


@pytest.mark.parametrize(
    ("given", "pass_", "backend"),
    [
        (problem(2, 256, 14, 14, 13, 13), "forward", "torch"),
        (problem(2, 256, 14, 14, 13, 13, channels_last=True), "forward", "rearranged"),
        (problem(2, 256, 14, 14, 15, 15), "forward", "rearranged"),
        (problem(2, 256, 14, 14, 15, 15, channels_last=True), "forward", "torch"),
        (problem(1, 1024, 7, 7, 13, 13, channels_last=True), "forward", "torch"),
        (problem(1, 512, 14, 14, 11, 11, channels_last=True), "forward", "torch"),
        (problem(8, 512, 14, 14, 11, 11, channels_last=True), "forward", "rearranged"),
        (problem(1, 1024, 7, 7, 13, 13), "input_grad", "torch"),
        (problem(2, 1024, 7, 7, 13, 13, channels_last=True), "input_grad", "torch"),
        (problem(8, 1024, 7, 7, 13, 13), "input_grad", "rearranged"),
        (problem(1, 512, 14, 14, 5, 5), "input_grad", "torch"),
        (problem(8, 512, 14, 14, 5, 5), "input_grad", "rearranged"),
        (problem(1, 512, 14, 14, 27, 27), "input_grad", "rearranged"),
        (problem(8, 128, 56, 56, 11, 11, channels_last=True), "input_grad", "torch"),
        (problem(8, 512, 14, 14, 11, 11, channels_last=True), "input_grad", "rearranged"),
        (problem(8, 128, 56, 56, 11, 11), "input_grad", "rearranged"),
    ],
)
def test_thresholds_with_avx512(given, pass_, backend, instructions):
    instructions("avx512")
    choice = choose(pass_, given)
    assert choice.backend == backend, choice


@pytest.mark.parametrize(
    ("given", "pass_", "channels_last", "gradient"),
    [
        (problem(2, 256, 14, 14, 9, 9), "forward", False, False),
        (problem(2, 256, 14, 14, 11, 11), "forward", False, True),
        (problem(2, 256, 14, 14, 11, 11, channels_last=True), "forward", True, False),
        (problem(8, 128, 56, 56, 31, 31, channels_last=True), "forward", False, True),
        (problem(2, 256, 14, 14, 9, 9), "input_grad", False, False),
        (problem(2, 256, 14, 14, 9, 1), "input_grad", False, True),
        (problem(2, 256, 14, 14, 11, 11), "input_grad", False, True),
        (problem(2, 256, 14, 14, 11, 11, channels_last=True), "input_grad", True, True),
        (problem(8, 256, 14, 14, 11, 11, channels_last=True), "input_grad", True, False),
        (problem(8, 128, 56, 56, 11, 11, channels_last=True), "input_grad", True, True),
        (problem(8, 128, 56, 56, 31, 31, channels_last=True), "input_grad", False, True),
        (problem(8, 96, 56, 56, 51, 5, channels_last=True), "forward", True, False),
    ],
)
def test_forms_with_avx2(given, pass_, channels_last, gradient, instructions):
    instructions("avx2")
    form = _cpu.form_of(pass_, given)
    assert (form.channels_last, form.gradient, form.width) == (channels_last, gradient, None), form


@pytest.mark.parametrize("name", ["avx512", "avx2"])
@pytest.mark.parametrize(
    ("given", "pass_", "backend"),
    [
        (problem(4, 512, 7, 7, 31, 31, channels_last=True), "forward", "rearranged"),
        (problem(2, 64, 56, 56, 1, 1), "forward", "rearranged"),
        (problem(2, 64, 56, 56, 11, 1), "weight_grad", "torch"),
        (problem(4, 512, 7, 7, 11, 1), "weight_grad", "rearranged"),
        (problem(2, 64, 56, 56, 1, 11), "weight_grad", "rearranged"),
        (problem(1, 1, 4, 4, 3, 3), "weight_grad", "torch"),
        (problem(2, 64, 28, 28, 7, 7, dtype=torch.bfloat16), "forward", "rearranged"),
        (problem(2, 64, 28, 28, 7, 7, dtype=torch.float64), "weight_grad", "torch"),
        (problem(2, 64, 28, 28, 7, 7, dtype=torch.float64), "input_grad", "torch"),
        (problem(2, 64, 28, 28, 7, 7, dtype=torch.float64, channels_last=True), "input_grad", "rearranged"),
    ],
)
def test_choices_that_no_instruction_changes(given, pass_, backend, name, instructions):
    instructions(name)
    choice = choose(pass_, given)
    assert choice.backend == backend, choice


@pytest.mark.parametrize(
    ("given", "way"),
    [
        (problem(8, 128, 56, 56, 7, 7), "images"),
        (problem(8, 128, 14, 14, 7, 7), "channels"),
        (problem(8, 512, 14, 14, 21, 21), "images"),
        (problem(2, 20, 33, 193, 31, 31), "strips"),
        (problem(8, 512, 14, 14, 7, 7, channels_last=True), "strips"),
        (problem(64, 96, 7, 7, 7, 7, channels_last=True), "channels"),
        (problem(2, 20, 33, 33, 7, 7, dtype=torch.float64), "strips"),
    ],
)
def test_ways_to_a_weight_gradient_with_avx2(given, way, instructions):
    instructions("avx2")
    found = _cpu.weight_grad_way(given.x_shape, given.kernel, given.dtype, channels_last=given.channels_last)
    assert found == way
    instructions("avx512")
    found = _cpu.weight_grad_way(given.x_shape, given.kernel, given.dtype, channels_last=given.channels_last)
    assert found == "strips"


@pytest.mark.parametrize("name", ["avx512", "avx2"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 5, 9, 20, 3, 7),
        (5, 17, 14, 14, 11, 13),
        (1, 9, 20, 14, 21, 15),
        (4, 8, 14, 13, 23, 21),
        (2, 3, 46, 45, 21, 31),
        (1, 10, 5, 90, 9, 11),
        (3, 20, 7, 7, 15, 9),
    ],
    ids=str,
)  # fmt: skip
def test_rearranged_matches_the_oracle(shape, channels_last, name, instructions, oracle):
    instructions(name)

    def run(x, w, b):
        return _Rearranged.apply(x, w, b)

    x, w, b, g = oracle.make_inputs(*shape, torch.float32, "cpu", channels_last=channels_last)
    oracle.check(run, x, w, b, g)


class _Rearranged(torch.autograd.Function):
    """All three passes as this backend runs them, where the choice would be torch's own too."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _rearranged.forward(x, weight, bias, None)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        kernel = weight.shape[2:]
        return _rearranged.input_grad(grad, weight), _rearranged.weight_grad(grad, x, *kernel), grad.sum((0, 2, 3))


@pytest.mark.parametrize(("kernel", "size", "expected"), [(3, 1, 1), (31, 7, 13), (13, 7, 13), (5, 56, 5)])
def test_reaching(kernel, size, expected):
    assert _cpu.reaching(kernel, size) == expected
