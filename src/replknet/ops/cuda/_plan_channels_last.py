"""From a channels_last problem to a launch; see `_plan.py` for the contiguous one."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, product

import torch

from replknet.ops.cuda._launch import Gpu, Launch
from replknet.ops.cuda._plan import (
    DTYPES,
    FORWARD,
    WEIGHT_GRAD,
    Columns,
    Shape,
    Tile,
    band,
    budget,
    columns_of,
    deltas,
    diagonal_floats,
    feasible,
    image_stride,
    offered,
    round_up,
    table_bytes,
    too_large,
)

CHANNELS_LAST = (*FORWARD, *WEIGHT_GRAD[1:], "channels_last.cu")
# Shared memory of the weight gradient's barriers.
BARRIERS = 512
MOST_SLOTS = 16
# Registers of a thread of the weight gradient's kernels with four loaders, from which others can take some.
LAUNCHED = 168
# Memory is read and written in pieces of so many bytes: blocks that need different parts of them keep together.
TOGETHER = 256
# Elements of x from which on two blocks share the pixels that they read.
WEIGHT_GRAD_SHARED_FROM = 1 << 20
FORWARD_SHARED_FROM = 1 << 22


@dataclass(frozen=True)
class ForwardTile(Tile):
    """Tuning parameters of the forward kernel.

    Attributes:
        columns: how the columns are cut.
        images: images of a tile (8, 4, 2 or 1); its other lanes are rows.
        tiles: row tiles of a set; the rows of a set are a slot of the ring.
        groups: groups of 8 channels of a block.
        channels: channels of a block: 8 a group, or fewer where the tables of 8 do not fit.
        warps: warps that convolve.
        loaders, storers: warps that read and write pixels.
        blocks: blocks a multiprocessor.
        slots: slots of the ring.
        cluster: blocks that share the pixels they read, a cluster of them.
    """

    columns: Columns
    images: int
    tiles: int
    groups: int
    channels: int
    warps: int
    loaders: int
    storers: int
    blocks: int
    slots: int
    cluster: int

    @property
    def stores_together(self) -> bool:
        """Whether the blocks of a cluster also write pixels together: alone each would write half sectors."""
        return self.cluster > 1 and self.groups == 1


@dataclass(frozen=True)
class Ring:
    """Where things lie in the ring, in bytes: between images, planes of channels, groups of 8, and bfloat16 planes."""

    stride: int
    plane: int
    group: int
    set: int


@dataclass(frozen=True)
class ForwardPlan:
    """A launch of the forward kernel and its tile arguments, in the order of the kernel's parameters."""

    launch: Launch
    item_rows: int
    channels: int
    share: int
    slots: int
    halo: int
    ring: Ring

    @property
    def arguments(self) -> tuple[int, ...]:
        ring = self.ring
        return (
            self.item_rows, self.channels, self.share, self.slots, self.halo,
            ring.stride, ring.plane, ring.group, ring.set,
        )  # fmt: skip


def forward_plan(shape: Shape, gpu: Gpu, tile: ForwardTile | None = None) -> ForwardPlan:
    """The launch for one forward convolution or input gradient.

    Raises:
        NotImplementedError: no tile fits the GPU's shared memory.
    """
    tile = tile or default_forward_tile(shape, gpu)
    columns, rows = tile.columns, set_rows(tile)
    template = (
        DTYPES[shape.dtype], shape.planes, shape.kh, shape.kw, columns.inputs, columns.outputs, columns.offset,
        tile.images, tile.tiles, tile.groups, _copy_width(shape, tile.channels), tile.cluster,
        tile.warps, tile.loaders, tile.storers, tile.blocks,
    )  # fmt: skip
    slots = gpu.multiprocessors * tile.blocks
    channel_blocks, share = math.ceil(shape.c / tile.channels), _share(shape, tile.channels, slots)
    pieces = channel_blocks * math.ceil(shape.n / tile.images) * columns.tiles
    # Few images: their rows are shared out too.
    cuts = 1 if pieces >= slots else min(math.ceil(shape.h / rows), slots // pieces)
    item_rows = round_up(math.ceil(shape.h / cuts), rows)
    runs = min(slots // share, pieces // share * math.ceil(shape.h / item_rows))
    launch = Launch(
        CHANNELS_LAST,
        f"forward_nhwc<{', '.join(map(str, template))}>",
        (runs * share, 1, 1),
        (tile.warps + tile.loaders + tile.storers) * 32,
        _forward_shared(shape, tile),
    )
    halo = halo_slots(shape, tile) if shape.h > rows else 0
    return ForwardPlan(launch, item_rows, tile.channels, share, tile.slots, halo, _ring(shape, tile))


def default_forward_tile(shape: Shape, gpu: Gpu) -> ForwardTile:
    """The tile with the least estimated time that fits.

    Raises:
        NotImplementedError: no tile fits the GPU's shared memory.
    """
    if not (found := list(_forward_tiles(shape, gpu))):
        raise NotImplementedError(too_large(shape, gpu))
    return min(found, key=lambda tile: _forward_time(shape, tile, gpu))


def forward_tiles(shape: Shape, gpu: Gpu) -> tuple[ForwardTile, ...]:
    """The default tile and, behind it, others that tuning should measure: those with the least estimated work.

    Raises:
        NotImplementedError: no tile fits the GPU's shared memory.
    """
    default = default_forward_tile(shape, gpu)
    others = sorted(_forward_tiles(shape, gpu), key=lambda tile: _forward_time(shape, tile, gpu))
    alone = (replace(default, cluster=1),)
    movers = (replace(default, loaders=loaders, storers=storers) for loaders, storers in ((4, 4), (2, 2), (4, 2)))

    def fits(tile: ForwardTile) -> bool:
        return feasible(forward_plan(shape, gpu, tile).launch, gpu, tile.blocks, _registers(shape, tile))

    return offered(default, chain(alone, movers, others), fits)


def set_rows(tile: ForwardTile) -> int:
    """Output rows of a set, which are the rows of a slot."""
    return 16 // tile.images * tile.tiles


def halo_slots(shape: Shape, tile: ForwardTile) -> int:
    """Slots above and below a set that its kernel rows reach; the pair of an odd last row included."""
    return math.ceil((shape.kh // 2 + 1) / set_rows(tile))


def _forward_tiles(shape: Shape, gpu: Gpu) -> Iterator[ForwardTile]:
    for columns in _column_cuts(shape):
        for images in sorted(_image_counts(shape), key=(4, 2, 8, 1).index):
            lanes = 16 // images
            whole = math.ceil(shape.h / lanes)
            # More than four tiles only where they are two rows apart and share their fragments.
            in_one = whole * columns.outputs <= 28 and (whole <= 4 or images == 8)
            for tiles in sorted({1, min(whole, 2), whole if in_one else 1}, reverse=True):
                for groups, channels in ((2, 16), (1, 8), (1, 4), (1, 2), (1, 1)):
                    cluster = _forward_cluster(shape, gpu, groups, channels)
                    tile = ForwardTile(columns, images, tiles, groups, channels, 8, 2, 2, 1, 1, cluster)
                    least = 1 if tiles == whole else 2 + 2 * halo_slots(shape, tile)
                    wanted = 3 if tiles == whole else 2 * least
                    fits = [
                        slots
                        for slots in range(least, min(wanted, MOST_SLOTS) + 1)
                        if _forward_shared(shape, replace(tile, slots=slots)) <= budget(gpu, tile.blocks)
                    ]
                    if fits and (groups == 1 or shape.c > 8):
                        for warps, movers in _warps(shape, tile):
                            yield replace(tile, warps=warps, loaders=movers, storers=movers, slots=fits[-1])
                        if groups == 1:
                            break


def _warps(shape: Shape, tile: ForwardTile) -> Iterator[tuple[int, int]]:
    """Warps that convolve, and of either kind that move, for which a thread has registers: 80, 96, 128 or 168."""
    accumulators, registers = 4 * tile.tiles * tile.columns.outputs, _registers(shape, tile)
    if _parts_of_sectors(shape, tile) or (tile.columns.outputs > 2 and accumulators >= 56):
        yield 8, 2
        if registers <= 124:
            yield 12, 2
    elif tile.cluster > 1 and tile.columns.outputs > 2 and registers > 124:
        yield 8, 2
    else:
        yield 8, 4
        # Narrow pieces of many pixels take more. The address of a tensor does not change the tile.
        size = 4 if shape.dtype == torch.float32 else 2
        if registers <= 92 and shape.c * size % 16 == 0 and tile.channels * size >= 16:
            yield 12, 4


def _forward_cluster(shape: Shape, gpu: Gpu, groups: int, channels: int) -> int:
    """Blocks that together read the pixels of so many channels each: two, where both have whole groups of channels.

    That halves the accesses, each of which costs the same however few bytes of a line it wants; few pixels are not
    worth it. Groups of float32 are 32 bytes, more than one access.
    """
    whole = channels == 8 * groups and shape.dtype != torch.float32 and shape.c % 8 == 0
    enough = shape.n * shape.c * shape.h * shape.w >= FORWARD_SHARED_FROM
    return 2 if gpu.clusters and whole and enough and _share(shape, channels, gpu.multiprocessors) % 2 == 0 else 1


def _parts_of_sectors(shape: Shape, tile: ForwardTile) -> bool:
    """Whether blocks read a part each of the same sectors, of memory that no cache holds: they must keep together."""
    return tile.groups == 1 and shape.dtype != torch.float32 and shape.n * shape.c * shape.h * shape.w > 20e6


def _registers(shape: Shape, tile: ForwardTile) -> int:
    """Registers that a thread needs, estimated."""
    low, high = deltas(shape.kw, tile.columns)
    # Fragments of all tiles where those are two rows apart; of two tiles, and of the step to come; else of one.
    sets = tile.tiles if tile.images == 8 else 2 * tile.tiles if tile.tiles <= 2 else 1
    return 44 + 4 * tile.tiles * tile.columns.outputs + 2 * sets * (high - low + 1)


def _forward_time(shape: Shape, tile: ForwardTile, gpu: Gpu) -> float:
    """Estimated cycles of the busiest multiprocessor.

    What its parts cost adds up, because they share the way to shared memory. The costs are those of a least-squares fit
    to 153 tiles of 12 problems (7x7 to 96x96, kernels 7 to 51, 1 to 64 images) on an H200, whose times it meets within
    10 % (standard deviation); what blocks of a cluster move, by a fit to 145 tiles of 16 problems.
    """
    columns, lanes, rows, p = tile.columns, 16 // tile.images, set_rows(tile), shape.kh // 2
    low, high = deltas(shape.kw, columns)
    a_step = sum(low <= c - columns.offset - j <= high for c in range(columns.inputs) for j in range(columns.outputs))
    height, padded = max(2, lanes), (shape.kh + 1) & ~1
    steps, products, fragments = 0, 0, 0
    for top in range(0, shape.h, rows):
        tiles = min(tile.tiles, math.ceil((shape.h - top) / height))
        first = max(0, p - top - lanes) & ~1
        last = min(padded + height * (tiles - 1), shape.h - top + p)
        mine = max(0, math.ceil((last - first) / 2))
        steps, fragments = steps + mine, fragments + mine * (1 if height == 2 else min(tile.tiles, 2))
        for t in range(tiles):
            # Many tiles that share fragments are multiplied at every step.
            skips = tile.tiles <= 2 or height > 2
            ends = (max(first, height * t), min(last, padded + height * t)) if skips else (first, last)
            products += max(0, math.ceil((ends[1] - ends[0]) / 2)) * a_step
    plan = forward_plan(shape, gpu, tile)
    cuts = math.ceil(shape.h / plan.item_rows)
    items = math.ceil(shape.n / tile.images) * columns.tiles * cuts * math.ceil(shape.c / tile.channels)
    rounds = math.ceil(items / plan.launch.grid[0])

    terms, size = shape.planes * (shape.planes + 1) // 2, 2 if shape.dtype == torch.float32 else 1
    tasks = tile.channels * terms / cuts
    reads = 4 * steps * columns.inputs + 2 * fragments * (high - low + 1)
    # Sets that are on their way at once are limited by the ring.
    busy = min(tile.warps, tile.channels * max(1, tile.slots - 2 * plan.halo))
    convolved = tasks * (0.96 * products + 0.28 * reads + 47 / busy * steps)
    read_rows = plan.item_rows + (min(shape.h - plan.item_rows, shape.kh - 1) if cuts > 1 else 0)
    if tile.cluster > 1:
        moved_rows = read_rows * columns.inputs + plan.item_rows * columns.outputs
        moved = moved_rows * tile.images * tile.groups * (19 if tile.stores_together else 13)
    else:
        moved, images = 0.0, (6 if _parts_of_sectors(shape, tile) else 1.5) * math.log2(tile.images)
        for n_rows, blocks, cost in (
            (read_rows, columns.inputs, 46 + 47 / tile.loaders),
            (plan.item_rows, columns.outputs, 58),
        ):
            units = blocks * tile.groups
            chunks = math.ceil(units / 4) if units > 2 else units / 4
            half_sectors = 6 * units if tile.groups == 1 and size == 1 else 0
            moved += size * n_rows * tile.images * (chunks * (cost + images) + half_sectors)
    slots = 40 * (math.ceil(shape.h / rows) / cuts + 2 * plan.halo)
    spare = tile.slots - 1 - 2 * plan.halo
    few = spare < 2 and shape.h > rows and (tile.tiles == 2 or tile.cluster > 1)
    tight = 1.6 if spare < 1 else 1.08 if few else 1.0
    # Warps that share channels wait for one another before the first product.
    start = 6_000 if tile.channels % tile.warps == 0 else 7_000
    return start + rounds * (convolved + moved + slots) * tight


def _ring(shape: Shape, tile: ForwardTile) -> Ring:
    _, stride = image_stride(tile.slots * set_rows(tile), tile.columns.inputs, tile.images)
    # Two planes whose words a warp writes at once lie 64 bytes apart modulo the banks, two groups 32.
    plane = round_up(stride * tile.images - 64, 128) + 64
    group = round_up(min(8, tile.channels) * plane, 128) + (32 if tile.groups == 2 else 0)
    return Ring(stride, plane, group, round_up(tile.groups * group, 128))


def _forward_shared(shape: Shape, tile: ForwardTile) -> int:
    columns = tile.columns
    tables = tile.channels * table_bytes(shape.kh, shape.kw, columns, shape.planes)
    # Three barriers a slot, and one for each of its channels; one more where two blocks write together.
    barriers = round_up(tile.slots * ((32 if tile.stores_together else 24) + 8 * tile.channels), 128)
    return barriers + round_up(columns.inputs * 16, 128) + tables + shape.planes * _ring(shape, tile).set


def _share(shape: Shape, channels: int, slots: int) -> int:
    """Blocks side by side that walk the same pixels: as many as have channels in the same bytes and run at once."""
    share = min(slots, max(1, TOGETHER // (channels * (4 if shape.dtype == torch.float32 else 2))))
    blocks = math.ceil(shape.c / channels)
    return max(size for size in range(1, share + 1) if blocks % size == 0)


def _column_cuts(shape: Shape) -> Iterator[Columns]:
    """Whole rows, or ever narrower column tiles."""
    yield (widest := columns_of(shape.w, shape.kw))
    blocks, halo = math.ceil(shape.w / 8), band(shape.kw)
    for outputs in (4, 2):
        if outputs < widest.outputs:
            yield Columns(outputs + 2 * halo, outputs, halo, math.ceil(blocks / outputs))


def _image_counts(shape: Shape) -> list[int]:
    most = min(8, 1 << (shape.n - 1).bit_length())
    return [size for size in (8, 4, 2, 1) if size <= most]


def _copy_width(shape: Shape, channels: int) -> int:
    """Bytes read and written at once: as many as the alignment and the channels of a block allow."""
    size = 4 if shape.dtype == torch.float32 else 2
    return max(size, min(16, shape.align, channels * size))


@dataclass(frozen=True)
class WeightGradTile(Tile):
    """Tuning parameters of the weight-gradient kernel.

    Attributes:
        columns, images, blocks: as in `ForwardTile`.
        pairs: kernel row pairs of a warp.
        shared: output rows that share rows of x.
        warps: warps that share the kernel row pairs of a channel; a block has 8 / warps channels.
        rows: rows of a slot.
        cluster: blocks that share the pixels they read, a cluster of them.
        loaders: warps that read pixels.
        x_slots, y_slots: slots of the rings.
        taken: registers of a thread that multiplies, if it takes more than its share from those that read pixels, or 0.
    """

    columns: Columns
    images: int
    pairs: int
    shared: int
    warps: int
    rows: int
    cluster: int
    loaders: int
    blocks: int
    x_slots: int
    y_slots: int
    taken: int


@dataclass(frozen=True)
class WeightGradPlan:
    """A launch of the weight-gradient kernel, its tile arguments, and the number of partial sums to add.

    `share`: pieces of the images that a run has, of those channels of which it has not all pieces.
    """

    launch: Launch
    item_rows: int
    halo: int
    x_slots: int
    x_ring: Ring
    y_slots: int
    y_ring: Ring
    share: int
    splits: int

    @property
    def arguments(self) -> tuple[int, ...]:
        x, y = self.x_ring, self.y_ring
        return (
            self.item_rows, self.halo, self.share, self.splits,
            self.x_slots, x.stride, x.plane, x.set, self.y_slots, y.stride, y.plane, y.set,
        )  # fmt: skip


def weight_grad_plan(shape: Shape, gpu: Gpu, tile: WeightGradTile | None = None) -> WeightGradPlan:
    """The launch for one weight gradient.

    Raises:
        NotImplementedError: no tile fits the GPU's shared memory.
    """
    tile = tile or default_weight_grad_tile(shape, gpu)
    columns, channels = tile.columns, 8 // tile.warps
    template = (
        DTYPES[shape.dtype], shape.planes, shape.kh, shape.kw, columns.inputs, columns.outputs, columns.offset,
        tile.images, tile.pairs, tile.shared, tile.warps, tile.rows,
        _copy_width(shape, channels * tile.cluster), tile.cluster, tile.loaders, tile.taken, tile.blocks,
    )  # fmt: skip
    groups = math.ceil(shape.c / (channels * tile.cluster))
    row_groups = math.ceil((shape.kh + 1) // 2 / (tile.pairs * tile.warps))
    pieces = math.ceil(shape.n / tile.images) * columns.tiles
    # Clusters that run at once.
    slots = max(1, gpu.multiprocessors * tile.blocks // (tile.cluster * row_groups))
    # Few images: their rows are shared out too.
    cuts = min(math.ceil(slots / (groups * pieces)), math.ceil(shape.h / tile.rows))
    item_rows = round_up(math.ceil(shape.h / cuts), tile.rows)
    pieces *= math.ceil(shape.h / item_rows)
    # A run has whole groups of channels, and a share of the pieces of those that are left.
    rest = groups % slots if groups >= slots else groups
    share = max(1, math.ceil(rest * pieces / slots))
    runs = slots if groups >= slots else math.ceil(rest * pieces / share)
    splits = max(
        (((group + 1) * pieces - 1) // share - group * pieces // share + 1 for group in range(rest)), default=1
    )
    launch = Launch(
        CHANNELS_LAST,
        f"weight_grad_nhwc<{', '.join(map(str, template))}>",
        (tile.cluster, runs, row_groups),
        (8 + tile.loaders) * 32,
        _weight_grad_shared(shape, tile),
    )
    halo, rings = _weight_grad_halo(shape, tile), _weight_grad_rings(shape, tile)
    return WeightGradPlan(launch, item_rows, halo, tile.x_slots, rings[0], tile.y_slots, rings[1], share, splits)


def default_weight_grad_tile(shape: Shape, gpu: Gpu) -> WeightGradTile:
    """The tile with the least estimated time that fits.

    Raises:
        NotImplementedError: no tile fits the GPU's shared memory.
    """
    if not (found := list(_weight_grad_tiles(shape, gpu))):
        raise NotImplementedError(too_large(shape, gpu))
    return min(found, key=lambda tile: _weight_grad_time(shape, tile, gpu))


def weight_grad_tiles(shape: Shape, gpu: Gpu) -> tuple[WeightGradTile, ...]:
    """As `forward_tiles`."""
    default = default_weight_grad_tile(shape, gpu)
    others = sorted(_weight_grad_tiles(shape, gpu), key=lambda tile: _weight_grad_time(shape, tile, gpu))
    movers = (replace(default, loaders=loaders) for loaders in (2, 8) if not default.taken)

    def fits(tile: WeightGradTile) -> bool:
        needed = _weight_grad_registers(shape, tile)
        registers = min(needed, LAUNCHED) if tile.taken else needed
        return feasible(weight_grad_plan(shape, gpu, tile).launch, gpu, tile.blocks, registers)

    return offered(default, chain(movers, others), fits)


def _weight_grad_tiles(shape: Shape, gpu: Gpu) -> Iterator[WeightGradTile]:
    for columns in _column_cuts(shape):
        for warps, pairs, images, shared in _weight_grad_shares(shape, columns):
            cluster = _weight_grad_cluster(shape, gpu, 8 // warps)
            tile = WeightGradTile(columns, images, pairs, shared, warps, 1, cluster, 4, 1, 1, 1, 0)
            if (needed := _weight_grad_registers(shape, tile)) > LAUNCHED:
                # What is left is enough for those of a cluster. Rows that share x want more than there are; narrow maps
                # read more for as many products.
                if cluster == 1 or shared == 2 or columns.outputs <= 4 or needed > 224:
                    continue
                tile = replace(tile, taken=208 if needed <= 208 else 216)
            step = 16 // images * shared
            for rows in {step, round_up(min(shape.h, 8), step), round_up(min(shape.h, 16), step)}:
                tile = replace(tile, rows=rows)
                halo = _weight_grad_halo(shape, tile)
                if rows > shape.h + step or (halo and (2 * halo + 2) * rows < 2 * pairs + 2):
                    continue
                fits = [
                    one
                    for x_slots, y_slots in ((1 + 2 * halo, 1), (2 + 2 * halo, 2), (4 + 2 * halo, 3))
                    if x_slots + y_slots <= 2 * MOST_SLOTS - 1
                    and _weight_grad_shared(shape, one := replace(tile, x_slots=x_slots, y_slots=y_slots))
                    <= budget(gpu, 1)
                ]
                if fits and (fits[-1].x_slots > 2 * halo + 1 or not halo):
                    yield fits[-1]


def _weight_grad_shares(shape: Shape, columns: Columns) -> Iterator[tuple[int, int, int, int]]:
    """(warps of a channel, kernel row pairs of a warp, images, output rows that share rows of x)."""
    (low, high), all_pairs = deltas(shape.kw, columns), (shape.kh + 1) // 2
    rounds = [
        (warps, math.ceil(all_pairs / (max(1, most // (high - low + 1)) * warps)))
        for most, warps in product((28, 42), (1, 2, 4))
    ]
    for (warps, times), images in product(dict.fromkeys(rounds), _image_counts(shape)):
        for shared in (2, 1) if images == 8 else (1,):
            yield warps, math.ceil(all_pairs / (times * warps)), images, shared


def _weight_grad_registers(shape: Shape, tile: WeightGradTile) -> int:
    """Registers that a warp that multiplies needs, estimated."""
    low, high = deltas(shape.kw, tile.columns)
    return 44 + 4 * tile.pairs * (high - low + 1) + 4 * tile.shared * math.ceil(tile.columns.outputs / 2)


def _weight_grad_cluster(shape: Shape, gpu: Gpu, channels: int) -> int:
    """Blocks that together read the pixels of so many channels each: two, where twice the channels are one access.

    That saves half the accesses, each of which costs the same however few bytes of a line it wants; few pixels are not
    worth it. Four blocks won on 64x64 maps only: 120 of an H200's 132 multiprocessors take them.
    """
    size = 4 if shape.dtype == torch.float32 else 2
    # The address of a tensor does not change the tile. What fits this alignment divides the channels too.
    aligned = min(16, shape.c * size & -(shape.c * size))
    enough = shape.n * shape.c * shape.h * shape.w >= WEIGHT_GRAD_SHARED_FROM
    return 2 if gpu.clusters and enough and 2 * channels * size <= aligned else 1


def _weight_grad_time(shape: Shape, tile: WeightGradTile, gpu: Gpu) -> float:
    """Estimated time of the busiest multiprocessor, in products of one column block.

    What the other parts cost is such that of the tiles of 26 problems, 760 measured on an H200, those with the least
    estimates take 1.5 % more than the fastest, on average.
    """
    columns, p, all_pairs, channels = tile.columns, shape.kh // 2, (shape.kh + 1) // 2, 8 // tile.warps
    lanes, rounds = 16 // tile.images, math.ceil(all_pairs / (tile.pairs * tile.warps))
    low, high = deltas(shape.kw, columns)
    a_step = sum(low <= c - columns.offset - j <= high for c in range(columns.inputs) for j in range(columns.outputs))
    products = reads = 0
    for top, first in product(range(0, shape.h, lanes * tile.shared), range(0, all_pairs, tile.pairs)):
        # The row pairs of x that a warp reads for its kernel row pairs, and those that each of its rows of dy meets.
        above = p - top - 2 * first
        begin = max(0, math.ceil((above - lanes) / 2))
        end = min(tile.pairs + tile.shared - 1, (shape.h - 1 + above) // 2 + 1)
        reads += max(0, end - begin) * columns.inputs + tile.shared * math.ceil(columns.outputs / 2)
        for row in range(tile.shared):
            products += max(0, min(end, row + tile.pairs) - max(begin, row)) * a_step
    plan = weight_grad_plan(shape, gpu, tile)
    groups, (_, runs, _) = math.ceil(shape.c / (channels * tile.cluster)), plan.launch.grid
    cuts = math.ceil(shape.h / plan.item_rows)
    pieces = math.ceil(shape.n / tile.images) * columns.tiles * cuts
    mine = (groups // runs * pieces + (plan.share if groups % runs else 0)) / cuts
    terms = shape.planes * (shape.planes + 1) // 2
    multiplied = channels * terms / rounds * (products + 2.5 * reads)
    moved = 0.9 * tile.images * shape.h * (columns.inputs + columns.outputs) / tile.cluster
    slots = 540 * math.ceil(shape.h / tile.rows)
    images = {8: 1.27, 4: 1.06, 2: 1.0, 1: 1.09}[tile.images]
    few = {1: 1.4, 2: 1.13 if plan.halo else 1.0}.get(tile.y_slots, 1.0)
    return mine * (multiplied + moved + slots) * images * few * (0.83 if tile.taken else 1.0)


def _weight_grad_halo(shape: Shape, tile: WeightGradTile) -> int:
    return 0 if shape.h <= tile.rows else math.ceil((shape.kh // 2 + 1) / tile.rows)


def _weight_grad_rings(shape: Shape, tile: WeightGradTile) -> tuple[Ring, Ring]:
    rings = []
    for slots, blocks in ((tile.x_slots, tile.columns.inputs), (tile.y_slots, tile.columns.outputs)):
        _, stride = image_stride(slots * tile.rows, blocks, tile.images)
        plane = round_up(stride * tile.images - 64, 128) + 64
        rings.append(Ring(stride, plane, 0, round_up(8 // tile.warps * plane, 128)))
    return rings[0], rings[1]


def _weight_grad_shared(shape: Shape, tile: WeightGradTile) -> int:
    columns = tile.columns
    x_ring, y_ring = _weight_grad_rings(shape, tile)
    low, high = deltas(shape.kw, columns)
    # The fragments of two column blocks of dy are loaded at once: the last may reach 16 bytes past the ring.
    rings = shape.planes * (x_ring.set + y_ring.set) + 128
    reduction = 8 * (diagonal_floats(low, high) + 2 * tile.pairs * shape.kw) * 4
    return BARRIERS + round_up(max(columns.inputs, columns.outputs + 1) * 16, 128) + max(rings, reduction)
