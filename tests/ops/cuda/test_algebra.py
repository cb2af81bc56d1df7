"""The fragment and index algebra of the kernels: their simulation against the definition of the convolution.

`simulation` is the module beside this one.
"""

import itertools
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from replknet.ops.cuda import _plan
from replknet.ops.cuda._launch import Gpu
from replknet.ops.cuda._plan import ForwardTile, Shape, WeightGradTile, columns_of

GPU = Gpu("sm_90", 2, 232448)  # two multiprocessors: few blocks, each with several items


def convolution(x, weight):
    (kh, kw), (h, w) = weight.shape[1:], x.shape[2:]
    padded, y = np.pad(x, ((0, 0), (0, 0), (kh // 2,) * 2, (kw // 2,) * 2)), np.zeros_like(x)
    for i in range(kh):
        for j in range(kw):
            y += weight[:, i, j][:, None, None] * padded[:, :, i : i + h, j : j + w]
    return y


def convolution_weight_grad(x, dy, kh, kw):
    h, w = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (kh // 2,) * 2, (kw // 2,) * 2))
    return np.stack(
        [
            np.stack([np.einsum("nchw,nchw->c", padded[:, :, i : i + h, j : j + w], dy) for j in range(kw)], 1)
            for i in range(kh)
        ],
        1,
    )


@dataclass(frozen=True)
class Case:
    """Sizes of x and of the kernel."""

    n: int
    c: int
    h: int
    w: int
    kh: int
    kw: int

    def __str__(self):
        return f"{self.n},{self.c},{self.h}x{self.w},{self.kh}x{self.kw}"

    def shape(self, start=0):
        """start: elements of 16 bits between an aligned address and x and y."""
        align = (2 * self.w | 2 * start) & -(2 * self.w | 2 * start)
        return Shape(self.n, self.c, self.h, self.w, self.kh, self.kw, torch.float16, 1, min(16, align))

    def arrays(self, seed=0):
        rng = np.random.default_rng(seed)
        size = (self.n, self.c, self.h, self.w)
        return rng.normal(size=size), rng.normal(size=size), rng.normal(size=(self.c, self.kh, self.kw))


CASES = [
    Case(1, 1, 1, 1, 1, 1),
    Case(1, 2, 1, 1, 5, 7),
    Case(17, 2, 7, 7, 13, 13),
    Case(3, 1, 5, 8, 3, 17),  # the band ends exactly at a block's edge
    Case(3, 1, 5, 24, 3, 15),
    Case(5, 2, 9, 13, 5, 9),
    Case(2, 3, 11, 20, 7, 3),
    Case(2, 1, 14, 16, 1, 31),
    Case(2, 1, 20, 12, 31, 1),
    Case(1, 1, 37, 9, 9, 5),
    Case(1, 1, 6, 67, 5, 19),  # column tiles with a halo, the last of them narrower
    Case(2, 1, 3, 136, 3, 51),
    Case(1, 1, 5, 12, 3, 63),  # taps that no column reaches
]


def close(got, expected):
    assert not np.isnan(got).any()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12 * max(1.0, np.abs(expected).max()))


def run_forward(simulation, case, tile=None, *, flip=False, start=0, by_channel=False):
    x, _, weight = case.arrays()
    shape = case.shape(start)
    tile = tile or _plan.default_forward_tile(shape, GPU)
    plan = _plan.forward_plan(shape, GPU, tile)
    close(
        simulation.forward_nchw(x, weight, plan, shape, tile, flip=flip, start=start, by_channel=by_channel),
        convolution(x, weight[:, ::-1, ::-1] if flip else weight),
    )


def run_weight_grad(simulation, case, tile=None):
    x, dy, _ = case.arrays()
    shape = case.shape()
    tile = tile or _plan.default_weight_grad_tile(shape, GPU)
    plan = _plan.weight_grad_plan(shape, GPU, tile)
    close(simulation.weight_grad_nchw(x, dy, plan, shape, tile), convolution_weight_grad(x, dy, case.kh, case.kw))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_with_the_default_plan(simulation, case):
    run_forward(simulation, case)


@pytest.mark.parametrize("case", CASES[1:9], ids=str)
def test_input_gradient_is_the_forward_with_the_weight_turned(simulation, case):
    run_forward(simulation, case, flip=True)


@pytest.mark.parametrize("images", [16, 8, 4, 2, 1])
@pytest.mark.parametrize("tiles", [1, 2, 3, 4])
def test_forward_for_every_cut_of_lanes_and_tiles(simulation, images, tiles):
    tile = ForwardTile(images, tiles, groups=2, warps=3, producers=2, stages=2, blocks=1)
    run_forward(simulation, Case(5, 2, 11, 13, 7, 9), tile)


@pytest.mark.parametrize("width", [*range(1, 17)])
@pytest.mark.parametrize("by_channel", [False, True])
def test_narrow_maps_wherever_their_rows_begin(simulation, width, by_channel):
    """x and y at odd elements too, in [N, C, H, W] and [C, N, H, W]; an odd number of images, the last group ragged."""
    for start, (n, h) in itertools.product((0, 1, 3), ((9, 5), (3, 10))):
        run_forward(simulation, Case(n, 2, h, width, 3, 5), start=start, by_channel=by_channel)


@pytest.mark.parametrize("images", [8, 4, 2, 1])
@pytest.mark.parametrize("tiles", [1, 2, 7])
@pytest.mark.parametrize(("width", "start"), [(7, 0), (7, 1), (13, 0), (13, 1), (14, 1), (16, 1)])
def test_spans_of_every_cut_of_lanes_and_tiles(simulation, images, tiles, width, start):
    tile = ForwardTile(images, tiles, groups=2, warps=3, producers=2, stages=2, blocks=1)
    run_forward(simulation, Case(11, 1, 15, width, 5, 3), tile, start=start)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weight_gradient_with_the_default_plan(simulation, case):
    run_weight_grad(simulation, case)


@pytest.mark.parametrize("images", [16, 8, 4, 2, 1])
@pytest.mark.parametrize("pairs", [1, 2, 4])
def test_weight_gradient_for_every_cut_of_lanes_and_kernel_rows(simulation, images, pairs):
    shared = 2 if images >= 8 and pairs > 1 else 1
    tile = WeightGradTile(images, pairs, shared, groups=2, slices=2, producers=2, stages=2, blocks=1)
    run_weight_grad(simulation, Case(5, 1, 11, 13, 7, 9), tile)


@pytest.mark.parametrize("rows", [2, 5, 8])
def test_items_of_a_few_rows(simulation, rows, monkeypatch):
    """Where shared memory holds a part of the rows: the halo rows of neighbouring items are loaded twice."""
    monkeypatch.setattr(_plan, "_item_rows", lambda *_: rows)
    monkeypatch.setattr(_plan, "_weight_grad_rows", lambda *_: rows)
    case = Case(3, 1, 17, 10, 9, 5)
    run_forward(simulation, case, ForwardTile(2, 2, 1, 3, 2, 2, 1))
    run_weight_grad(simulation, case, WeightGradTile(2, 2, 1, 1, 1, 2, 2, 1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_random_problems(simulation, seed):
    rng = random.Random(seed)
    case = Case(
        rng.randint(1, 9), rng.randint(1, 2), rng.randint(1, 24), rng.choice([rng.randint(1, 40), rng.randint(65, 90)]),
        rng.randrange(1, 22, 2), rng.randrange(1, 40, 2),
    )  # fmt: skip
    narrow = case.w <= 16
    start, by_channel = (rng.choice((0, 1, 3, 5)), rng.random() < 0.5) if narrow else (0, False)
    run_forward(simulation, case, flip=seed % 2 == 1, start=start, by_channel=by_channel)
    run_weight_grad(simulation, case)


@pytest.mark.parametrize("images", [1, 3, 9])
@pytest.mark.parametrize(
    ("width", "vector", "asynchronous"),
    [(7, 2, False), (14, 4, True), (14, 4, False), (20, 8, True), (56, 16, True), (97, 2, False), (72, 16, True)],
)
def test_loader_brings_every_element_once(simulation, images, width, vector, asynchronous):
    n_rows, columns = 19, columns_of(width, 13)
    for tile in range(columns.tiles):
        left = tile * columns.outputs * 8 - 8 * columns.offset
        pitch, stride = _plan.image_stride(n_rows, columns.inputs, 1)
        seen = set()
        for at, image, row, col, step in simulation.loader_writes(
            images, n_rows, left, stride, pitch, columns.inputs, 4, vector, asynchronous
        ):
            # A copy is whole: all of its elements are inside the row, or none.
            if asynchronous:
                assert len({0 <= col + i < width for i in range(step)}) == 1
                assert at % vector == 0
            for i in range(step):
                place = (at // 2 + i, image, row, col + i)
                assert place not in seen
                seen.add(place)
        assert seen == {
            ((image * stride + row * pitch) // 2 + col, image, row, left + col)
            for image in range(images)
            for row in range(n_rows)
            for col in range(columns.inputs * 8)
        }
