"""The channels_last kernels: pixels to planes and back, the rings, and both kernels whole, against plain definitions.

`simulation` and `ring` are the modules beside this one.
"""

import itertools
import math
import random
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from replknet.ops import cuda as kernels
from replknet.ops import depthwise_conv2d
from replknet.ops.cuda import _plan_channels_last as plan_cl
from replknet.ops.cuda._launch import Gpu
from replknet.ops.cuda._plan import Columns, Shape, image_stride
from replknet.ops.cuda._plan_channels_last import ForwardTile, WeightGradTile

HUGE = Gpu("sm_90", 3, 1 << 24)  # every tile fits; few blocks, each with several items
SMALL = Gpu("sm_90", 3, 232448)
# The same with clusters of blocks.
CLUSTERED = replace(SMALL, multiprocessors=5, clusters=True)
HALF, FLOAT = (torch.float16, 1), (torch.float32, 3)


def shape_of(n, c, h, w, kh, kw, kind=HALF) -> Shape:
    dtype, planes = kind
    n_bytes = c * (4 if dtype == torch.float32 else 2)
    return Shape(n, c, h, w, kh, kw, dtype, planes, min(16, n_bytes & -n_bytes))


# ---- pixels to planes and back
UNITS = [(blocks, groups, images) for blocks, groups, images in itertools.product(range(1, 12), (1, 2), (8, 4, 2, 1))]


def ring_layout(simulation, slots_rows, blocks, images, groups, channels, planes):
    """As the plan lays it out."""
    tile = ForwardTile(Columns(blocks, blocks, 0, 1), images, 1, groups, channels, 1, 1, 1, 1, 1, 1)
    shape = Shape(1, channels, 9, 8 * blocks, 3, 3, torch.float16, planes, 16)
    ring = plan_cl._ring(shape, replace(tile, slots=math.ceil(slots_rows / plan_cl.set_rows(tile))))
    pitch, _ = image_stride(1, blocks, images)
    layout = simulation.RingLayout(128, min(8, channels), ring.stride, ring.plane, ring.group, ring.set)
    return layout, pitch, 128 + planes * ring.set


class Rows:
    """Some rows of some channels of a random tensor, and where they belong: what is missing is a zero."""

    def __init__(self, simulation, blocks, groups, images, size, planes):
        rng = random.Random(f"{blocks} {groups} {images} {size}")
        self.channels = rng.choice((8, 4, 2, 1)) if groups == 1 else 16
        c = rng.choice((max(1, self.channels - 1), self.channels, 2 * self.channels + 3, 3 * self.channels))
        c0 = rng.choice(range(0, c, self.channels))
        self.images, self.rows, self.slot_row, self.warps = images, 3, rng.randint(0, 2), rng.choice((1, 2, 4))
        self.limit, n = min(c - c0, self.channels), rng.randint(1, images)
        self.left, width = rng.choice((0, -8, 8)), 8 * blocks + rng.randint(-7, 16)
        numbers = np.random.default_rng(rng.randrange(1000)).permutation(n * 5 * width * c) + 1
        # float32 that has all its bits.
        self.x = (numbers * np.float32(1.1)).astype(np.float32).astype(float) if size == 4 else numbers.astype(float)
        self.sizes, h0 = (n, 5, width, c), rng.randint(0, 2)
        self.part = np.s_[:, h0 : h0 + self.rows, :, c0 : c0 + self.limit]
        self.start = h0 * width * c + c0
        self.layout, self.pitch, n_bytes = ring_layout(
            simulation, self.slot_row + self.rows, blocks, images, groups, self.channels, planes
        )
        self.memory = np.full(n_bytes // 2, np.nan)
        align = max(size, min(16, c * size & -c * size, self.channels * size))
        most, depth = rng.randint(self.rows, 8), rng.choice((2, 4, 8, 16))
        self.units = simulation.Units(size, planes, blocks, self.pitch, images, groups, align, most, self.warps, depth)

    def lines(self):
        """(image, row, channel, index of its first column in memory)."""
        for image, row, channel in itertools.product(range(self.images), range(self.rows), range(self.channels)):
            at = self.layout.base + channel // 8 * self.layout.group + channel % 8 * self.layout.plane
            at += image * self.layout.stride + (self.slot_row + row) * self.pitch
            yield image, row, channel, at // 2

    def expected(self, columns):
        (n, _, width, _), out = self.sizes, np.zeros((self.images, self.rows, columns, self.channels))
        pixels = self.x.reshape(self.sizes)[self.part]
        for column in range(columns):
            if 0 <= self.left + column < width:
                out[:n, :, column, : self.limit] = pixels[:, :, self.left + column]
        return out


@pytest.mark.parametrize(("blocks", "groups", "images"), UNITS, ids=str)
@pytest.mark.parametrize(("size", "planes"), [(2, 1), (4, 2), (4, 3)])
def test_pixels_reach_their_planes_once(simulation, blocks, groups, images, size, planes):
    t = Rows(simulation, blocks, groups, images, size, planes)
    n, height, width, c = t.sizes
    writes, planned = np.zeros(len(t.memory), int), np.zeros(len(t.memory), int)
    for warp in range(t.warps):
        for at, words, ok in t.units.load(
            t.layout, t.slot_row, t.x, t.start, n, t.rows, t.left, height, width, c, t.limit, warp
        ):
            index = at[ok, None] // 2 + np.arange(2)
            np.add.at(writes, index, 1)
            t.memory[index] = words[ok]
    expected, step = t.expected(blocks * 8), t.layout.set // 2
    for image, row, channel, at in t.lines():
        parts = [slice(at + p * step, at + p * step + blocks * 8) for p in range(planes)]
        for part in parts:
            planned[part] += 1
        got = sum(t.memory[part] for part in parts)
        # Two bfloat16 planes hold 17 bits of a float32; three hold it.
        np.testing.assert_allclose(got, expected[image, row, :, channel], rtol=2.0**-17 if planes == 2 else 0)
    assert (writes == planned).all()


@pytest.mark.parametrize(("blocks", "groups", "images"), UNITS, ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_planes_come_back_to_their_pixels_once(simulation, blocks, groups, images, size):
    t = Rows(simulation, blocks, groups, images, size, size // 2)
    n, height, width, c = t.sizes
    t.left, columns = 0, min(width, 8 * blocks)
    expected = t.expected(blocks * 8)
    for image, row, channel, at in t.lines():
        halves = simulation.split_halves(expected[image, row, :, channel]) if size == 4 else ()
        for p, values in enumerate(halves or (expected[image, row, :, channel],)):
            t.memory[at + p * t.layout.set // 2 :][: blocks * 8] = values
    y, writes = np.zeros(t.x.size), np.zeros(t.x.size, int)
    for warp in range(t.warps):
        for kind, at, values in t.units.store(
            t.layout, t.slot_row, t.memory, n, t.rows, width, height, width, c, t.limit, warp
        ):
            if kind == "write":
                y[t.start + at] = values
                np.add.at(writes, t.start + at, 1)
    planned = np.zeros(t.sizes, int)
    planned[t.part][:, :, :columns] = 1
    assert (writes.reshape(t.sizes) == planned).all()
    assert (y == t.x * planned.reshape(-1)).all()


def conflicts(address, ok) -> int:
    """The most different words that lanes of one access want from one bank."""
    words = {int(at) // 4 for at in address[ok]}
    return max(Counter(word % 32 for word in words).values(), default=0)


@pytest.mark.parametrize(("blocks", "groups", "images"), UNITS, ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_lanes_of_a_warp_seldom_meet_in_a_bank(simulation, blocks, groups, images, size):
    t = Rows(simulation, blocks, groups, images, size, size // 2)
    n, height, width, c = t.sizes
    t.memory[:] = 0
    worst = 0
    for at, _, ok in t.units.load(t.layout, t.slot_row, t.x, t.start, n, t.rows, t.left, height, width, c, t.limit, 0):
        worst = max(worst, conflicts(at, ok))
    for kind, at, ok in t.units.store(t.layout, t.slot_row, t.memory, n, t.rows, width, height, width, c, t.limit, 0):
        if kind == "read":
            worst = max(worst, conflicts(at, ok))
    # Short lines that a warp moves together lie where the images and rows put them.
    assert worst <= (1 if t.units.lines == 1 else 2)


# ---- the rings
@pytest.fixture
def shared(monkeypatch):
    """Clusters for small problems too."""
    monkeypatch.setattr(plan_cl, "FORWARD_SHARED_FROM", 0)
    monkeypatch.setattr(plan_cl, "WEIGHT_GRAD_SHARED_FROM", 0)
    plans = kernels._forward_plan_channels_last, kernels._weight_grad_plan_channels_last
    for plan in plans:
        plan.cache_clear()
    yield
    for plan in plans:
        plan.cache_clear()


def forward_tile(rng, shape, gpu) -> ForwardTile:
    """Any tile, whatever the rules of the plan would choose."""
    columns = rng.choice(list(plan_cl._column_cuts(shape)))
    images, tiles = rng.choice(plan_cl._image_counts(shape)), rng.choice((1, 1, 2, 3))
    groups, channels = rng.choice(((2, 16), (1, 8), (1, 4), (1, 2), (1, 1)))
    warps, loaders, storers = rng.choice((8, 10, 12, 16)), rng.choice((2, 4)), rng.choice((2, 4))
    # Two blocks have whole groups of 16-bit values each, and no block is left alone.
    pairs = gpu.clusters and shape.dtype != torch.float32 and channels >= 8
    pairs = pairs and plan_cl._share(shape, channels, gpu.multiprocessors) % 2 == 0
    cluster = rng.choice((1, 2)) if pairs else 1
    tile = ForwardTile(columns, images, tiles, groups, channels, warps, loaders, storers, 1, 1, cluster)
    halo = plan_cl.halo_slots(shape, tile) if shape.h > plan_cl.set_rows(tile) else 0
    return replace(tile, slots=1 + 2 * halo + rng.choice((0, 0, 1, 2, 3)))


def weight_grad_tile(rng, shape, gpu) -> WeightGradTile:
    """The same for the weight gradient; a warp's kernel rows are within the ring, as in `_weight_grad_tiles`."""
    columns, images = rng.choice(list(plan_cl._column_cuts(shape))), rng.choice(plan_cl._image_counts(shape))
    shared, warps = 2 if images == 8 else 1, rng.choice((1, 2, 4))
    pairs = rng.randint(1, math.ceil((shape.kh + 1) // 2 / warps))
    rows = 16 // images * shared * rng.choice((1, 1, 2, 3))
    # A cluster's channels are 16 bytes of a pixel at most.
    most = warps if shape.dtype != torch.float32 else max(1, warps // 2)
    cluster = min(most, rng.choice((1, 2, 4))) if gpu.clusters else 1
    tile = WeightGradTile(columns, images, pairs, shared, warps, rows, cluster, rng.choice((1, 4)), 1, 1, 1, 0)
    halo, spare = plan_cl._weight_grad_halo(shape, tile), rng.choice((0, 0, 1, 2))
    if halo:
        spare += max(0, math.ceil((2 * pairs + 2) / rows) - 2 * halo - 1)
    return replace(tile, x_slots=1 + 2 * halo + spare, y_slots=rng.choice((1, 1, 2, 3)))


@st.composite
def problems(draw, tile_of):
    """(shape, plan's GPU, tile): tiles of chance."""
    odd = st.integers(0, 15).map(lambda i: 2 * i + 1)
    shape = shape_of(
        draw(st.integers(1, 20)), draw(st.integers(1, 40)), draw(st.integers(1, 70)), draw(st.integers(1, 90)),
        draw(odd), draw(odd),
    )  # fmt: skip
    rng = random.Random(draw(st.integers(0, 1 << 30)))
    gpu = replace(CLUSTERED, shared_bytes=1 << 24, multiprocessors=draw(st.integers(4, 40)))
    tile = tile_of(rng, shape, gpu)
    # Enough is seen in a moment.
    assume(math.ceil(shape.n / tile.images) * tile.columns.tiles * shape.h * shape.c <= 6000)
    return shape, gpu, tile


many = settings(max_examples=120, deadline=None, derandomize=True)


def rows_of(ring, shape, tile, plan, rows):
    pieces = ring.Pieces(shape, tile.images, tile.columns.outputs * 8, plan.item_rows, rows, plan.halo)
    places = itertools.product(
        range(0, shape.n, tile.images), range(0, shape.w, tile.columns.outputs * 8), range(shape.h)
    )
    return pieces, Counter(places)


def check_forward(ring, shape, gpu, tile, seed):
    plan, rows, cluster = plan_cl.forward_plan(shape, gpu, tile), plan_cl.set_rows(tile), tile.cluster
    pieces, places = rows_of(ring, shape, tile, plan, rows)
    stored = Counter()
    for number in range(0, plan.launch.grid[0], cluster):
        items = ring.forward_walk(pieces, shape, plan, number)
        assert items, "a block without work"
        # The others of a cluster do the same with the channels behind.
        for other in range(1, cluster):
            theirs = ring.forward_walk(pieces, shape, plan, number + other)
            assert theirs == [replace(item, c0=item.c0 + other * plan.channels) for item in items]
        block, consumers = ring.Block(seed + number), (3, 5, 2)[seed % 3]
        ledger = ring.Ledger(
            block, shape, rows, plan.halo, {"x": plan.slots}, 3 * cluster, 2 * cluster, cluster,
            0 if tile.stores_together else 2,
        )  # fmt: skip
        warps = consumers, 2, 2
        block.run(ring.forward_warps(items, plan.halo, plan.slots, warps, 3, ledger, cluster, tile.stores_together))
        stored += ledger.stored
    channels = range(0, shape.c, plan.channels * cluster)
    assert stored == Counter({(warp, c0, *at): 1 for warp in range(2 * cluster) for c0 in channels for at in places})


def check_weight_grad(ring, shape, gpu, tile, seed):
    plan, together = plan_cl.weight_grad_plan(shape, gpu, tile), 8 // tile.warps * tile.cluster
    pieces, places = rows_of(ring, shape, tile, plan, tile.rows)
    cluster, runs, _ = plan.launch.grid
    assert cluster == tile.cluster
    used, shares, warps = Counter(), {}, 2 * cluster
    for run in range(runs):
        parts = ring.weight_grad_walk(pieces, math.ceil(shape.c / together), together, plan, run)
        assert parts, "a run without work"
        for part in parts:
            shares.setdefault(part.items[0].c0, {})[part.split] = part.ends
        block, rings = ring.Block(seed + run), (plan.x_slots, plan.y_slots)
        names = dict(zip("xy", rings, strict=True))
        ledger = ring.Ledger(block, shape, tile.rows, plan.halo, names, warps, warps, cluster)
        block.run(ring.weight_grad_warps(parts, plan.halo, rings, (2, 2), ledger, cluster))
        used += ledger.used
    channels = range(0, shape.c, together)
    assert used == Counter({(warp, c0, *at): 1 for warp in range(warps) for c0 in channels for at in places})
    # Every partial sum is written once: by a part of its own, or as a zero behind the last.
    for split in shares.values():
        assert split == {i: i == len(split) - 1 for i in range(len(split))}
    assert max(map(len, shares.values())) == plan.splits


@many
@given(problems(forward_tile), st.integers(0, 1000))
def test_the_forward_ring_moves_every_row_once_and_in_time(ring, problem, seed):
    shape, gpu, tile = problem
    check_forward(ring, shape, gpu, tile, seed)


@many
@given(problems(weight_grad_tile), st.integers(0, 1000))
def test_the_weight_gradients_rings_move_every_row_once_and_in_time(ring, problem, seed):
    shape, gpu, tile = problem
    check_weight_grad(ring, shape, gpu, tile, seed)


@pytest.mark.parametrize("size", [7, 14, 28, 56, 97])
@pytest.mark.parametrize("kernel", [3, 13, 31])
@pytest.mark.parametrize("n", [1, 9])
def test_the_rings_of_default_plans(ring, shared, size, kernel, n):
    shape = shape_of(n, 32, size, size, kernel, kernel)
    for gpu in (SMALL, CLUSTERED):
        check_forward(ring, shape, gpu, plan_cl.default_forward_tile(shape, gpu), 0)
        check_weight_grad(ring, shape, gpu, plan_cl.default_weight_grad_tile(shape, gpu), 0)


@pytest.mark.parametrize("clusters", [False, True])
@pytest.mark.parametrize(
    "problem",
    [
        (64, 128, 56, 56, 31, 31),
        (64, 256, 28, 28, 29, 29),
        (64, 384, 64, 64, 31, 31),
        (64, 96, 56, 56, 51, 5),
        (16, 256, 40, 40, 21, 21),
    ],
    ids=str,
)
def test_runs_share_out_the_work_and_go_through_the_images_in_step(ring, problem, clusters):
    """Out of step each would read all of memory for its few channels of it."""
    shape, gpu = shape_of(*problem), Gpu("sm_90", 132, 232448, clusters)
    tile = plan_cl.default_weight_grad_tile(shape, gpu)
    plan = plan_cl.weight_grad_plan(shape, gpu, tile)
    pieces, _ = rows_of(ring, shape, tile, plan, tile.rows)
    together, (cluster, runs, _) = 8 // tile.warps * tile.cluster, plan.launch.grid
    groups = math.ceil(shape.c / together)
    walks = [ring.weight_grad_walk(pieces, groups, together, plan, run) for run in range(runs)]
    orders = [[replace(item, c0=0) for part in walk for item in part.items] for walk in walks]
    assert max(map(len, orders)) == math.ceil(groups * pieces.count / (132 // cluster))
    for step in itertools.zip_longest(*orders):
        assert len(set(step) - {None}) <= math.ceil(pieces.count / plan.share) + 1


def tight_forward(ring, slots, lead=1):
    """A single block with a ring of so many slots."""
    shape = shape_of(1, 1, 9, 8, 3, 3)
    items = [ring.Pieces(shape, 1, 8, 9, 2, lead).item(0)]
    block = ring.Block(0)
    ledger = ring.Ledger(block, shape, 2, lead, {"x": slots}, 2, 2)
    block.run(ring.forward_warps(items, lead, slots, (2, 2, 2), 2, ledger))


def test_one_slot_less_is_a_deadlock(ring):
    tight_forward(ring, 3)
    with pytest.raises(AssertionError, match="deadlock"):
        tight_forward(ring, 2)


def test_a_halo_too_short_is_found(ring):
    with pytest.raises(AssertionError, match=r"instead of|may not be done"):
        tight_forward(ring, 6, lead=0)


def test_a_loader_that_does_not_wait_is_found(ring):
    shape = shape_of(1, 1, 30, 8, 3, 3)
    items = [ring.Pieces(shape, 1, 8, 30, 2, 1).item(0)]
    block = ring.Block(0)
    ledger = ring.Ledger(block, shape, 2, 1, {"x": 4}, 2, 2)
    warps = ring.forward_warps(items, 1, 4, (2, 2, 2), 2, ledger)
    # The first loader's waits go unheard.
    hasty = ((barrier, phase) for barrier, phase in warps[2] if phase is None)
    with pytest.raises(AssertionError):
        block.run([*warps[:2], hasty, *warps[3:]])


def test_a_consumer_that_overtakes_its_channel_is_found(ring):
    shape = shape_of(1, 1, 30, 8, 3, 3)
    items = [ring.Pieces(shape, 1, 8, 30, 2, 1).item(0)]

    def run(hasty):
        block = ring.Block(0)
        ledger = ring.Ledger(block, shape, 2, 1, {"x": 8}, 2, 2)
        warps = ring.forward_warps(items, 1, 8, (3, 2, 2), 2, ledger)
        # A barrier that counts to 1 is a channel's; nobody waits for those.
        unheard = lambda warp: (at for at in warp if at[1] is None or at[0].count > 1)  # noqa: E731
        block.run([unheard(warp) if hasty else warp for warp in warps])

    run(hasty=False)
    with pytest.raises(AssertionError, match=r"may not be done|is not done"):
        run(hasty=True)


def test_a_storer_that_does_not_wait_for_the_other_block_is_found(ring):
    shape = shape_of(1, 16, 30, 8, 3, 3)
    items = [ring.Pieces(shape, 1, 8, 30, 2, 1).item(0)]

    def run(hasty):
        for seed in range(10):
            block = ring.Block(seed)
            ledger = ring.Ledger(block, shape, 2, 1, {"x": 8}, 4, 4, cluster=2)
            warps = ring.forward_warps(items, 1, 8, (2, 2, 2), 2, ledger, cluster=2, together=True)
            # What a storer waits for besides its own block's consumers counts to 1.
            unheard = lambda warp: (at for at in warp if at[1] is None or at[0].count > 1)  # noqa: E731
            block.run([*warps[:8], *map(unheard, warps[8:])] if hasty else warps)

    run(hasty=False)
    with pytest.raises(AssertionError, match=r"may not be done|instead of"):
        run(hasty=True)


# ---- both kernels whole
def close(got, expected, tolerance):
    assert not np.isnan(got).any()
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max()))


def tolerance(shape) -> float:
    """Of the sums of planes: 24 bits of a float32, or 16; 16-bit elements are exact in the simulation."""
    return {1: 1e-12, 2: 2.0**-14, 3: 2.0**-21}[shape.planes]


def draw(shape, seed=0):
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(size=(2, shape.n, shape.h, shape.w, shape.c))
    weight, bias = rng.normal(size=(shape.c, shape.kh, shape.kw)), rng.normal(size=shape.c)
    if shape.dtype == torch.float32:
        x, dy, weight, bias = (value.astype(np.float32).astype(float) for value in (x, dy, weight, bias))
    return x, dy, weight, bias


def padded(x, shape):
    return np.pad(x, ((0, 0), (shape.kh // 2,) * 2, (shape.kw // 2,) * 2, (0, 0)))


def copy_width(plan, position) -> int:
    return int(plan.launch.expression.rstrip(">").split(", ")[position])


def run_forward(ring, simulation, shape, gpu, tile):
    x, _, weight, bias = draw(shape)
    plan, columns = plan_cl.forward_plan(shape, gpu, tile), tile.columns
    warps = plan.launch.block // 32
    k = simulation.Forward(shape.kh, shape.kw, columns, tile.images, tile.tiles, warps, tile.blocks)
    pieces, _ = rows_of(ring, shape, tile, plan, plan_cl.set_rows(tile))
    y, writes = np.full(x.shape, np.nan), np.zeros(x.shape, int)
    for number in range(0, plan.launch.grid[0], tile.cluster):
        actions = simulation.ForwardNhwc(k, x, weight, bias, plan, shape, tile, copy_width(plan, 10), y, writes)
        items = ring.forward_walk(pieces, shape, plan, number)
        counts = tile.warps, tile.loaders, tile.storers
        cluster = tile.cluster, tile.stores_together
        warps = ring.forward_warps(items, plan.halo, plan.slots, counts, plan.channels, actions, *cluster)
        ring.Block(number).run(warps)
    assert (writes == 1).all()
    expected, wide = np.zeros_like(x) + bias, padded(x, shape)
    for i, j in itertools.product(range(shape.kh), range(shape.kw)):
        expected += weight[:, i, j] * wide[:, i : i + shape.h, j : j + shape.w]
    close(y, expected, tolerance(shape))


def run_weight_grad(ring, simulation, shape, gpu, tile):
    x, dy, _, _ = draw(shape)
    plan, columns = plan_cl.weight_grad_plan(shape, gpu, tile), tile.columns
    k = simulation.WeightGrad(shape.kh, shape.kw, columns, tile.images, tile.pairs, tile.shared)
    pieces, _ = rows_of(ring, shape, tile, plan, tile.rows)
    counts, together = (8, tile.loaders), 8 // tile.warps * tile.cluster
    partial = np.full((plan.splits, shape.c, shape.kh, shape.kw), np.nan)
    _, runs, groups = plan.launch.grid
    for run, group in itertools.product(range(runs), range(groups)):
        actions = simulation.WeightGradNhwc(k, x, dy, plan, shape, tile, copy_width(plan, 12), group, partial)
        parts = ring.weight_grad_walk(pieces, math.ceil(shape.c / together), together, plan, run)
        rings = plan.x_slots, plan.y_slots
        ring.Block(run).run(ring.weight_grad_warps(parts, plan.halo, rings, counts, actions, tile.cluster))
    got = partial.sum(0)
    wide = padded(x, shape)
    expected = np.zeros_like(got)
    for i, j in itertools.product(range(shape.kh), range(shape.kw)):
        expected[:, i, j] = np.einsum("nhwc,nhwc->c", wide[:, i : i + shape.h, j : j + shape.w], dy)
    close(got, expected, tolerance(shape))


WHOLE = [
    shape_of(1, 1, 1, 1, 1, 1),
    shape_of(2, 3, 5, 7, 5, 3),
    shape_of(3, 9, 9, 12, 7, 9),
    shape_of(5, 3, 7, 7, 13, 13),
    shape_of(1, 2, 37, 9, 9, 5),
    shape_of(1, 4, 6, 67, 5, 19),  # column tiles, the last of them narrower
    shape_of(9, 5, 3, 3, 3, 3),
    shape_of(3, 16, 10, 13, 5, 7),  # two blocks together, where there are clusters: a group each
    shape_of(1, 64, 7, 19, 3, 3),  # or two groups
    shape_of(2, 3, 9, 10, 5, 3, (torch.float32, 2)),
    shape_of(1, 2, 21, 9, 7, 5, (torch.float32, 3)),
]


@pytest.mark.parametrize("gpu", [SMALL, CLUSTERED], ids=["", "clusters"])
@pytest.mark.parametrize("shape", WHOLE, ids=str)
def test_forward_with_the_default_plan(ring, simulation, shared, shape, gpu):
    run_forward(ring, simulation, shape, gpu, plan_cl.default_forward_tile(shape, gpu))


def test_the_last_group_of_two_blocks_may_be_empty(ring, simulation, shared):
    shape = shape_of(2, 24, 7, 19, 3, 3)
    tiles = (tile for tile in plan_cl._forward_tiles(shape, CLUSTERED) if (tile.groups, tile.cluster) == (2, 2))
    run_forward(ring, simulation, shape, CLUSTERED, next(tiles))


@pytest.mark.parametrize("gpu", [SMALL, CLUSTERED], ids=["", "clusters"])
@pytest.mark.parametrize("shape", WHOLE, ids=str)
def test_weight_gradient_with_the_default_plan(ring, simulation, shared, shape, gpu):
    run_weight_grad(ring, simulation, shape, gpu, plan_cl.default_weight_grad_tile(shape, gpu))


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 60))])
def test_tiles_of_chance(ring, simulation, seed):
    """Rings as tight as can be, sets of one to three tiles, one to sixteen channels a block."""
    rng = random.Random(seed)
    kind = rng.choice((HALF, HALF, (torch.float32, 2), FLOAT))
    shape = shape_of(
        rng.randint(1, 9), rng.randint(1, 5), rng.randint(1, 24), rng.choice((rng.randint(1, 20), rng.randint(40, 80))),
        rng.randrange(1, 12, 2), rng.randrange(1, 20, 2), kind,
    )  # fmt: skip
    run_forward(ring, simulation, shape, HUGE, forward_tile(rng, shape, HUGE))
    gpu = replace(CLUSTERED, shared_bytes=1 << 24)
    run_weight_grad(ring, simulation, shape, gpu, weight_grad_tile(rng, shape, gpu))


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 40))])
def test_forward_tiles_of_chance_of_two_blocks(ring, simulation, seed):
    rng, tile = random.Random(seed), None
    gpu = replace(CLUSTERED, shared_bytes=1 << 24)
    while tile is None or tile.cluster == 1:
        shape = shape_of(
            rng.randint(1, 5), rng.randint(9, 32), rng.randint(1, 20), rng.randint(1, 30),
            rng.randrange(1, 8, 2), rng.randrange(1, 12, 2),
        )  # fmt: skip
        tile = forward_tile(rng, shape, gpu)
    run_forward(ring, simulation, shape, gpu, tile)


# ---- on a GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "problem",
    [
        (2, 16, 20, 24, 13, 13),
        (3, 40, 47, 44, 31, 31),
        (5, 12, 14, 14, 27, 27),
        (1, 24, 130, 40, 51, 5),
        (9, 10, 21, 23, 29, 29),  # channels that do not share an access
        (2, 64, 33, 40, 7, 7),
        (4, 32, 96, 96, 31, 31),
        (64, 128, 56, 56, 31, 31),
        (64, 256, 28, 28, 29, 29),
    ],
    ids=str,
)
def test_blocks_that_share_pixels(cuda, oracle, shared, problem, dtype):
    if not (gpu := kernels.gpu_of(0)).clusters:
        pytest.skip("needs a GPU with clusters of blocks (sm_90 or newer)")
    shape, size = shape_of(*problem, (dtype, 3 if dtype == torch.float32 else 1)), 4 if dtype == torch.float32 else 2
    tile = plan_cl.default_weight_grad_tile(shape, gpu)
    assert tile.cluster == 2 or 2 * 8 // tile.warps * size > 16 or shape.c * size % 16
    tile = plan_cl.default_forward_tile(shape, gpu)
    assert (tile.cluster == 2) == (size == 2 and shape.c in (16, 32, 64, 128, 256))
    x, w, b, g = oracle.make_inputs(*problem, dtype, cuda, channels_last=True)
    oracle.check(partial(depthwise_conv2d, backend="cuda"), x, w, b, g)
    assert torch.equal(*(kernels.weight_grad(g, x, *problem[4:]) for _ in range(2)))
    assert torch.equal(*(kernels.forward(x, w, b, None) for _ in range(2)))
