"""float32 as a sum of bfloat16 planes, and the products of planes that make up a float32 product."""

import math
import re

import pytest
import torch

from replknet.ops.cuda._compile import source


def peel(values: torch.Tensor, planes: int) -> list[torch.Tensor]:
    """The planes of float32 values, as `peel` of common.cuh makes them one after the other."""
    out = []
    for _ in range(planes):
        plane = values.to(torch.bfloat16).float()
        rest = values - plane
        values = torch.where(rest - rest == 0, rest, 0.0)
        out.append(plane)
    return out


def terms(planes: int) -> list[tuple[int, int]]:
    """The plane of x and of w of every product, read from the constants of struct Terms."""
    text = source(("common.cuh",))
    tables = [
        [int(digits, 16) for digits in re.findall(r"0x([0-9a-f]+) >> \(4 \* i\)", line)]
        for line in re.findall(r"int [xw]\(int i\) \{.*", text)
    ]
    assert [len(table) for table in tables] == [2, 2]
    count = planes * (planes + 1) // 2
    x, w = (table[planes - 2] for table in tables)
    return [((x >> 4 * i) & 15, (w >> 4 * i) & 15) for i in range(count)]


def numbers(seed):
    """float32 of both signs over 60 binary orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(20000, generator=generator) * torch.exp2(torch.randint(-30, 30, (20000,), generator=generator))


@pytest.mark.parametrize(("planes", "bits"), [(2, 17), (3, 24)])
def test_planes_hold_the_float(planes, bits):
    x = numbers(0)
    total = torch.stack(peel(x, planes)).double().sum(0)
    assert ((total - x.double()).abs() <= x.double().abs() * 2.0**-bits).all()
    if planes == 3:
        assert torch.equal(total, x.double())


@pytest.mark.parametrize("planes", [2, 3])
def test_terms_are_the_products_of_the_largest_planes_smallest_first(planes):
    expected = {(x, w) for x in range(planes) for w in range(planes) if x + w < planes}
    assert set(terms(planes)) == expected
    assert len(terms(planes)) == len(expected)
    assert [x + w for x, w in terms(planes)] == sorted((x + w for x, w in expected), reverse=True)


@pytest.mark.parametrize("planes", [2, 3])
def test_the_simulation_has_the_same_terms_and_planes(simulation, planes):
    assert simulation.TERMS[planes] == terms(planes)
    x = numbers(4)
    rest = x.double().numpy()
    for plane in peel(x, planes):
        got, rest = simulation.peel(rest)
        assert (got == plane.numpy()).all()


@pytest.mark.parametrize(("planes", "bits"), [(2, 15), (3, 24)])
def test_terms_make_up_the_product(planes, bits):
    x, w = numbers(1), numbers(2)
    px, pw = peel(x, planes), peel(w, planes)
    total = sum(px[i].double() * pw[j].double() for i, j in terms(planes))
    exact = x.double() * w.double()
    # Left out are the products of plane sum NP, and below them what is 2^-8 of that.
    assert ((total - exact).abs() <= exact.abs() * 2.0**-bits * (1 + 2.0**-8)).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_in_the_first_plane(value):
    first, *others = peel(torch.tensor([value]), 3)
    torch.testing.assert_close(first, torch.tensor([value]), equal_nan=True)
    assert all(plane.item() == 0 for plane in others)
    weight = peel(numbers(3)[:1], 3)
    assert not math.isfinite(sum((first, *others)[i].item() * weight[j].item() for i, j in terms(3)))


def test_the_planes_of_zero_and_of_bfloat16_numbers_are_themselves():
    x = torch.tensor([0.0, -0.0, 1.0, -2.5, 3.0e38]).to(torch.bfloat16).float()
    first, second, third = peel(x, 3)
    assert torch.equal(first, x)
    assert not second.any()
    assert not third.any()
