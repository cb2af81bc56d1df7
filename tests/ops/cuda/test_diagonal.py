"""The kernel of diagonal.cu: its simulation against the definition of the weight gradient, and its launches.

Transcribed lane by lane and step by step, one block after the other; a slot holds NaN wherever its step wrote nothing.
"""

import itertools
import math
import random

import numpy as np
import pytest
import torch

from replknet.ops.cuda import _plan_diagonal as plans
from replknet.ops.cuda._launch import Gpu
from replknet.ops.cuda._plan import Shape

H100, SMALL = Gpu("sm_90", 132, 232448), Gpu("sm_86", 2, 101376)
LANE = np.arange(32)
G, QUAD = LANE >> 2, LANE & 3


def shape_of(n, c, h, w, kh, kw, dtype=torch.float16, align=16):
    return Shape(n, c, h, w, kh, kw, dtype, 1, align)


class Pair:
    """StreamPair: two parts of images, and the steps in which one of them has a row."""

    def __init__(self, shape, rows, columns, number):
        self.p, self.h = shape.kh // 2, shape.h
        parts, tiles = math.ceil(shape.h / rows), math.ceil(shape.w / columns)
        self.col0 = number % tiles * columns
        streams = [2 * (number // tiles) + i for i in range(2)]
        self.n, self.row0 = [s // parts for s in streams], [s % parts * rows for s in streams]
        self.row1 = [min(shape.h, r + rows) if n < shape.n else r for n, r in zip(self.n, self.row0, strict=True)]
        there = [i for i in range(2) if self.row1[i] > self.row0[i]]
        self.lo = min(max(0, self.p - self.row0[i]) for i in there)
        self.hi = max(min(shape.h, self.row1[i] + self.p) - self.row0[i] + self.p for i in there)

    def row(self, i, t):
        """Input row of stream i at step t, or None."""
        row = self.row0[i] - self.p + t
        return row if 0 <= row < min(self.h, self.row1[i] + self.p) and self.row1[i] > self.row0[i] else None


def items_of(shape, tile):
    columns = 8 * tile.units
    pairs = math.ceil(shape.n * math.ceil(shape.h / tile.rows) / 2) * math.ceil(shape.w / columns)
    return [Pair(shape, tile.rows, columns, number) for number in range(pairs)]


class Block:
    """Shared memory of a block and what its loaders do."""

    def __init__(self, shape, tile):
        self.shape, self.tile, self.groups = shape, tile, tile.groups
        self.pitch, self.columns = (tile.groups | 1) * 16, 8 * tile.units
        self.pixels = self.columns + shape.kw - 1
        self.inputs, self.outputs = self.pixels * self.pitch, self.columns * self.pitch

    def row(self, memory, at, image, row, left, pixels, c0):
        """One row of a stream; None is a row of zeros. image: [N, H, W, C]."""
        for e in range(pixels * self.groups):
            column, c = left + e // self.groups, c0 + e % self.groups * 8
            inside = row is not None and 0 <= column < self.shape.w and c < self.shape.c
            to = (at + e // self.groups * self.pitch + e % self.groups * 16) // 2
            assert np.isnan(memory[to : to + 8]).all(), "written twice"
            memory[to : to + 8] = image[row[0], row[1], column, c : c + 8] if inside else 0


def weight_grad(simulation, x, dy, shape, tile, splits):
    """weight_grad_diagonal and the sum over the splits."""
    block, kh, kw = Block(shape, tile), shape.kh, shape.kw
    items, total = items_of(shape, tile), np.zeros((shape.c, kh, kw))
    pairs = (kw + 1) // 2
    for c0, split in itertools.product(range(0, shape.c, 8 * tile.groups), range(splits)):
        acc = np.zeros((tile.units, tile.groups, kh, pairs, 4, 32))
        for item in items[len(items) * split // splits : len(items) * (split + 1) // splits]:
            window = np.zeros((tile.units, tile.groups, kh, 2, 32, 2))
            for t in range(max(tile.rows, item.hi)):
                s, multiply, fresh = t % kh, item.lo <= t < item.hi, t < tile.rows
                memory = np.full(block.inputs + block.outputs, np.nan)
                for i in range(2):
                    if multiply:
                        row = item.row(i, t)
                        source = None if row is None else (item.n[i], row)
                        block.row(memory, i * block.inputs, x, source, item.col0 - kw // 2, block.pixels, c0)
                    if fresh:
                        row = item.row0[i] + t
                        source = (item.n[i], row) if row < item.row1[i] else None
                        at = 2 * block.inputs + i * block.outputs
                        block.row(memory, at, dy, source, item.col0, block.columns, c0)
                for unit, group in itertools.product(range(tile.units), range(tile.groups)):
                    places, lane_pixel = window[unit, group], unit * 8 + (LANE & 7)
                    places[(s + kh - 1) % kh] = 0
                    if fresh:
                        at = 2 * block.inputs + (LANE >> 3 & 1) * block.outputs + lane_pixel * block.pitch + group * 16
                        places[(s + kh - 1) % kh] = simulation.ldmatrix(memory, at, transposed=True)[:2]
                    if multiply:
                        for j in range(pairs):
                            second = (LANE >> 3 & 1) * block.pitch if 2 * j + 1 < kw else 0
                            at = (LANE >> 4) * block.inputs + (lane_pixel + 2 * j) * block.pitch + group * 16 + second
                            a = simulation.ldmatrix(memory, at, transposed=True)
                            for ky in range(kh):
                                simulation.mma(acc[unit, group, ky, j], a, places[(s + kh - 1 - ky) % kh])
        for unit, group, ky, kx in itertools.product(*map(range, (tile.units, tile.groups, kh, kw))):
            for lane in LANE[(G >> 1 == QUAD) & (c0 + group * 8 + G < shape.c)]:
                tap = acc[unit, group, ky, kx // 2, 2 * (kx % 2) + (G[lane] & 1), lane]
                total[c0 + group * 8 + G[lane], ky, kx] += tap
    return total


def run(simulation, shape, tile):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, shape.n, shape.h, shape.w, shape.c))
    wide = np.pad(x, ((0, 0), (shape.kh // 2,) * 2, (shape.kw // 2,) * 2, (0, 0)))
    expected = np.zeros((shape.c, shape.kh, shape.kw))
    for i, j in itertools.product(range(shape.kh), range(shape.kw)):
        expected[:, i, j] = np.einsum("nhwc,nhwc->c", wide[:, i : i + shape.h, j : j + shape.w], dy)
    got = weight_grad(simulation, x, dy, shape, tile, plans.weight_grad_plan(shape, SMALL, tile).splits)
    assert not np.isnan(got).any()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize(
    "shape",
    [
        shape_of(1, 8, 1, 1, 1, 1),
        shape_of(1, 8, 1, 1, 7, 7),
        shape_of(2, 16, 5, 7, 5, 3),
        shape_of(3, 8, 7, 7, 7, 7),  # a stream without an image
        shape_of(1, 24, 9, 12, 3, 7),
        shape_of(1, 8, 6, 67, 3, 5),  # column tiles, the last of them narrower
        shape_of(2, 8, 4, 9, 1, 11),
        shape_of(2, 8, 13, 3, 11, 1),
    ],
    ids=str,
)
def test_the_default_plan(simulation, shape):
    run(simulation, shape, plans.default_tile(shape, SMALL))


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 30))])
def test_tiles_of_chance(simulation, seed):
    draw = random.Random(seed)
    kh, kw = draw.choice([(1, 3), (3, 3), (5, 5), (7, 7), (1, 11), (11, 1), (3, 7), (9, 5)])
    shape = shape_of(draw.randint(1, 5), 8 * draw.randint(1, 3), draw.randint(1, 12), draw.randint(1, 30), kh, kw)
    run(simulation, shape, plans.DiagonalTile(draw.randint(1, 3), draw.randint(1, 2), draw.randint(1, shape.h), 2))


# ---- launches
def shapes(count):
    draw = random.Random(0)
    for _ in range(count):
        kh, kw = draw.choice([(1, 1), (1, 3), (3, 3), (5, 5), (7, 7), (1, 11), (11, 1), (3, 7), (11, 3), (9, 5)])
        size, w = draw.choice([1, 2, 7, 14, 33, 56, 112, 193]), draw.choice([1, 7, 8, 14, 56, 64, 65, 112, 200, 333])
        yield shape_of(draw.choice([1, 2, 5, 64, 256]), 8 * draw.randint(1, 190), size, w, kh, kw, torch.bfloat16)


@pytest.mark.parametrize("gpu", [H100, SMALL], ids=lambda gpu: gpu.arch)
def test_every_launch_is_within_the_limits_of_the_gpu(gpu):
    for shape in shapes(300):
        tile = plans.default_tile(shape, gpu)
        plan = plans.weight_grad_plan(shape, gpu)
        launch, (n, c, h, w, rows, slots) = plan.launch, plan.arguments
        assert launch.shared_bytes <= gpu.shared_bytes
        assert launch.block == (tile.units * tile.groups + plans.LOADERS) * 32 <= 32 * plans.MOST_WARPS
        # 16 bytes of barriers a slot.
        assert 2 <= slots <= plans.BARRIERS // 16
        assert (n, c, h, w) == (shape.n, shape.c, shape.h, shape.w)
        assert 1 <= rows == tile.rows <= shape.h
        # A bit of a register for every piece of a row that a lane asks for.
        assert (8 * tile.units + shape.kw - 1) * tile.groups <= 32 * 32 * plans.LOADERS
        # The ring, or the sums of all units that take its place.
        block = Block(shape, tile)
        assert launch.shared_bytes >= plans.BARRIERS + slots * tile.steps * 2 * (block.inputs + block.outputs)
        assert launch.shared_bytes >= plans.BARRIERS + 4 * tile.units * tile.groups * 8 * shape.kh * shape.kw
        assert launch.grid == (math.ceil(shape.c / (8 * tile.groups)), plan.splits, 1)
        assert 1 <= plan.splits <= len(items_of(shape, tile))


@pytest.mark.parametrize(
    ("shape", "taken"),
    [
        (shape_of(1, 8, 7, 7, 7, 7), True),
        (shape_of(1, 8, 7, 7, 7, 7, torch.bfloat16), True),
        (shape_of(1, 8, 7, 7, 7, 7, torch.float32), False),
        (shape_of(1, 8, 7, 7, 7, 7, align=8), False),
        (shape_of(1, 12, 7, 7, 7, 7), False),
        (shape_of(1, 8, 7, 7, 9, 7), False),
        (shape_of(1, 8, 7, 7, 1, 13), False),
        # Up to 25 taps on large maps alone, 3x3 nowhere.
        (shape_of(1, 8, 28, 28, 5, 5), False),
        (shape_of(1, 8, 56, 56, 5, 5), True),
        (shape_of(1, 8, 56, 56, 1, 11), True),
        (shape_of(1, 8, 112, 112, 3, 3), False),
    ],
    ids=str,
)
def test_which_problems_it_takes(shape, taken):
    assert plans.suits(shape) is taken
