"""Launches of the kernels for small kernels: which problems they take, and that every output has a thread."""

import math
import random

import pytest
import torch

from replknet.ops.cuda import _plan_direct
from replknet.ops.cuda._launch import Gpu
from replknet.ops.cuda._plan import Shape

H100, SMALL = Gpu("sm_90", 132, 232448), Gpu("sm_86", 20, 101376)


def shape_of(n, c, h, w, kh, kw, dtype=torch.bfloat16, align=16):
    return Shape(n, c, h, w, kh, kw, dtype, 2 if dtype == torch.float32 else 1, align)


def random_shapes(count):
    draw = random.Random(0)
    for _ in range(count):
        kh, kw = draw.choice([(1, 3), (3, 3), (5, 5), (7, 7), (1, 11), (11, 1), (3, 7), (11, 3), (9, 5)])
        size = draw.choice([1, 2, 7, 14, 33, 56, 112, 193])
        n, c, w = draw.choice([1, 2, 5, 64, 256]), draw.randint(1, 1500), draw.randint(1, 200)
        yield shape_of(n, c, size, w, kh, kw, draw.choice([torch.float16, torch.bfloat16, torch.float32]))


@pytest.mark.parametrize("gpu", [H100, SMALL], ids=lambda gpu: gpu.arch)
def test_every_output_has_a_thread(gpu):
    for shape in random_shapes(300):
        tile = _plan_direct.default_tile(shape, gpu)
        plan = _plan_direct.forward_plan(shape, gpu, 0)
        lanes, channel_blocks = _plan_direct._lanes(shape)
        assert lanes <= 32
        assert 2 * lanes * channel_blocks >= shape.c > 2 * lanes * (channel_blocks - 1)
        strips = shape.n * math.ceil(shape.w / tile.columns)
        blocks = math.ceil(strips / (plan.launch.block // lanes)) * math.ceil(shape.h / tile.rows) * channel_blocks
        assert plan.launch.grid == (blocks, 1, 1)
        assert plan.launch.block % lanes == 0
        assert plan.launch.block <= _plan_direct.THREADS
        assert plan.arguments == (shape.n, shape.h, shape.w, tile.rows)
        assert 1 <= tile.rows <= shape.h


def test_a_weight_gradient_has_no_block_without_work():
    for shape in random_shapes(300):
        plan, tile = (
            _plan_direct.weight_grad_plan(shape, H100),
            _plan_direct.default_tile(shape, H100, weight_grad=True),
        )
        lanes, channel_blocks = _plan_direct._lanes(shape)
        strips = shape.n * math.ceil(shape.w / tile.columns)
        items = math.ceil(strips / (plan.launch.block // lanes)) * math.ceil(shape.h / tile.rows)
        assert plan.launch.grid == (channel_blocks, plan.splits, 1)
        assert 1 <= plan.splits <= items
        assert plan.launch.shared_bytes == 8 * lanes * shape.kh * shape.kw <= 48 * 1024


def test_a_map_is_walked_whole_where_images_fill_the_gpu_and_in_parts_where_not():
    assert _plan_direct.default_tile(shape_of(64, 512, 14, 14, 5, 5), H100) == _plan_direct.DirectTile(7, 14, 2)
    few = _plan_direct.default_tile(shape_of(1, 128, 56, 56, 5, 5), H100)
    assert few.rows < 14
    assert few.columns < 7


def test_columns_are_checked_only_where_they_can_lie_outside():
    def whole(w, columns, kw=5):
        return _plan_direct._whole(shape_of(1, 8, 9, w, 5, kw), _plan_direct.DirectTile(columns, 9, 2))

    assert whole(14, 7)
    assert not whole(15, 7)
    # The halo of a strip would reach past its neighbour.
    assert whole(9, 3, kw=7)
    assert not whole(9, 3, kw=9)


@pytest.mark.parametrize(
    ("channels", "align", "dtype", "wide"),
    [
        (64, 16, torch.bfloat16, 1),
        (64, 2, torch.bfloat16, 0),
        (63, 16, torch.float16, 0),
        (64, 4, torch.float32, 0),
        (64, 8, torch.float32, 1),
    ],
)
def test_pairs_of_channels_are_read_at_once_where_they_are_aligned(channels, align, dtype, wide):
    plan = _plan_direct.forward_plan(shape_of(2, channels, 14, 14, 5, 5, dtype, align), H100, 0)
    assert plan.launch.expression.split(", ")[6] == str(wide)


@pytest.mark.parametrize(
    ("kernel", "size", "dtype", "forward", "weight_grad"),
    [
        ((5, 5), 56, torch.bfloat16, True, True),
        ((7, 7), 56, torch.bfloat16, False, False),
        ((7, 7), 14, torch.bfloat16, False, True),
        ((7, 7), 56, torch.float32, True, True),
        ((1, 11), 28, torch.float16, True, True),
        ((1, 13), 28, torch.float16, False, False),
        ((51, 5), 56, torch.float32, False, False),
    ],
)
def test_which_problems_they_take(kernel, size, dtype, forward, weight_grad):
    kh, kw = kernel
    shape = shape_of(64, 128, size, size, kh, kw, dtype)
    assert _plan_direct.suits(shape, weight_grad=False) is forward
    assert _plan_direct.suits(shape, weight_grad=True) is weight_grad
