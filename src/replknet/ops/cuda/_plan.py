"""From a problem to a launch: tile shapes, shared memory, grid. Pure arithmetic, testable without a GPU.

The constants of a kernel's template are computed here a second time; tests hold both to each other.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any, ClassVar, TypeVar

import torch

from replknet.ops.cuda._launch import Gpu, Launch

FORWARD = ("common.cuh", "forward.cu")
WEIGHT_GRAD = ("common.cuh", "weight_grad.cu")
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
LARGEST_KERNEL = 63
HEAD = 256
# Tiles of a problem that tuning measures: each is a kernel to compile.
MOST_TILES = 12
THREADS = 1024
THREADS_OF_MULTIPROCESSOR = 1536


@dataclass(frozen=True)
class Shape:
    """One convolution as the kernels see it.

    Attributes:
        n, c, h, w: sizes of x.
        kh, kw: kernel size, odd.
        dtype: float16, bfloat16 or float32.
        planes: bfloat16 planes that carry a float32 (2: the accuracy of TF32 and better, 3: float32's); 1 otherwise.
        align: largest power of two, at most 16, that divides the addresses of all rows in bytes.
    """

    n: int
    c: int
    h: int
    w: int
    kh: int
    kw: int
    dtype: torch.dtype
    planes: int
    align: int


@dataclass(frozen=True)
class Columns:
    """Column blocks of 8: `inputs` are loaded, `outputs` computed, output block 0 lies at input block `offset`."""

    inputs: int
    outputs: int
    offset: int
    tiles: int

    def __str__(self) -> str:
        return f"{self.tiles}x{self.outputs}"


class Tile:
    """Tuning parameters of a kernel, a dataclass; a tile's text is its name wherever measurements are kept."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    blocks: int

    def __str__(self) -> str:
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


AnyTile = TypeVar("AnyTile", bound=Tile)


@dataclass(frozen=True)
class ForwardPlan:
    """A launch of the forward kernel and the arguments that depend on its tile shape."""

    launch: Launch
    item_images: int
    item_rows: int
    stride: int


@dataclass(frozen=True)
class WeightGradPlan:
    """A launch of the weight-gradient kernel, its tile arguments, and the number of partial sums to add."""

    launch: Launch
    item_images: int
    item_rows: int
    x_stride: int
    y_stride: int
    splits: int


@dataclass(frozen=True)
class SmallKernelPlan:
    """A launch for a small kernel, the numbers behind its pointers, and the partial sums of a weight gradient."""

    launch: Launch
    arguments: tuple[int, ...]
    splits: int = 1


@dataclass(frozen=True)
class ForwardTile(Tile):
    """Tuning parameters of the forward kernel.

    Attributes:
        images: images of a tile (16, 8, 4, 2 or 1); its other lanes are rows.
        tiles: row tiles of a task.
        groups: groups of `images` of an item.
        warps, producers, stages, blocks: consumer and producer warps, stages of the ring, blocks a multiprocessor.
    """

    images: int
    tiles: int
    groups: int
    warps: int
    producers: int
    stages: int
    blocks: int


@dataclass(frozen=True)
class WeightGradTile(Tile):
    """Tuning parameters of the weight-gradient kernel.

    Attributes:
        images, groups, producers, stages, blocks: as in `ForwardTile`.
        pairs: kernel row pairs of a warp.
        shared: output rows that share rows of x.
        slices: warps that share the rows for the same kernel row pairs.
    """

    images: int
    pairs: int
    shared: int
    groups: int
    slices: int
    producers: int
    stages: int
    blocks: int


def columns_of(w: int, kw: int) -> Columns:
    """How the columns are cut: whole rows up to 64 columns, else tiles with the kernel's halo on both sides."""
    blocks = math.ceil(w / 8)
    if blocks <= 8:
        return Columns(blocks, blocks, 0, 1)
    tiles = math.ceil(blocks / 8)
    outputs, halo = math.ceil(blocks / tiles), band(kw)
    return Columns(outputs + 2 * halo, outputs, halo, math.ceil(blocks / outputs))


def band(k: int) -> int:
    """Largest distance in column blocks at which a kernel of k columns reaches another block."""
    return (k // 2 + 7) // 8


def deltas(kw: int, columns: Columns) -> tuple[int, int]:
    """Smallest and largest (input block - output block) that is not zero and occurs."""
    reach = band(kw)
    return max(-reach, 1 - columns.outputs - columns.offset), min(reach, columns.inputs - 1 - columns.offset)


def table_bytes(kh: int, kw: int, columns: Columns, planes: int) -> int:
    """Shared memory of one channel's table of Toeplitz fragments."""
    (low, high), p = deltas(kw, columns), kw // 2
    smallest, largest = 8 * low - 7 + p, 8 * high + 6 + p
    offset = (1 - smallest) // 2 * 2 if smallest < 0 else -(smallest // 2 * 2)
    copy = round_up((kh + 1) // 2 * ((largest + offset) // 2 + 1) * 8, 128) + 64
    return round_up(planes * 2 * copy, 128)


def image_stride(rows: int, blocks: int, images: int) -> tuple[int, int]:
    """Bytes between rows and between images in shared memory, so that eight lanes never meet in a bank."""
    pitch = (blocks if images >= 8 else blocks | 1) * 16
    slots = rows * pitch // 16
    step, wanted = {16: (2, 1), 8: (2, 1), 4: (8, 2), 2: (8, 4), 1: (1, 0)}[images]
    return pitch, (slots + (wanted - slots) % step) * 16


def copy_width(shape: Shape) -> int:
    """Bytes of one asynchronous copy; 2: elements go through registers."""
    return 2 if shape.dtype == torch.float32 else max(2, min(16, shape.align))


def is_narrow(shape: Shape, columns: Columns) -> bool:
    """Whether rows are so short, and begin so unevenly, that they are loaded and stored as spans of many."""
    return shape.dtype != torch.float32 and columns.inputs <= 2 and copy_width(shape) == 2


def staging_bytes(shape: Shape, columns: Columns, tile: ForwardTile) -> int:
    """Shared memory in which a consumer warp lays out a task's results as they lie in y; 0 where it does not."""
    rows = 16 // tile.images
    if not is_narrow(shape, columns) or rows == 1:
        return 0
    return tile.images * (rows * tile.tiles * columns.outputs * 16 + 16)


def forward_plan(shape: Shape, gpu: Gpu, tile: ForwardTile | None = None) -> ForwardPlan:
    """The launch for one forward convolution or input gradient."""
    tile = tile or default_forward_tile(shape, gpu)
    columns, images = columns_of(shape.w, shape.kw), tile.images * tile.groups
    rows = _item_rows(shape, gpu, tile, columns)
    _, stride = _forward_stage(shape, columns, tile, rows)
    width = copy_width(shape)
    store = 1 if shape.w % 2 else 4 if shape.dtype != torch.float32 and shape.w % 4 == 0 else 2
    template = (
        DTYPES[shape.dtype], shape.planes, shape.kh, shape.kw, columns.inputs, columns.outputs, columns.offset,
        tile.images, tile.tiles, width, store, tile.warps, tile.producers, tile.stages, tile.blocks,
    )  # fmt: skip
    items = shape.c * columns.tiles * math.ceil(shape.h / rows) * math.ceil(shape.n / images)
    launch = Launch(
        FORWARD,
        f"forward_nchw<{', '.join(map(str, template))}>",
        (min(items, gpu.multiprocessors * tile.blocks), 1, 1),
        (tile.warps + tile.producers) * 32,
        _forward_shared(shape, columns, tile, rows),
    )
    return ForwardPlan(launch, images, rows, stride)


def default_forward_tile(shape: Shape, gpu: Gpu) -> ForwardTile:
    """Tile chosen by rule; the rules follow measurements on an H100 (`benchmarks/results/`).

    Raises:
        NotImplementedError: no tile fits the GPU's shared memory.
    """
    columns, most = columns_of(shape.w, shape.kw), min(16, 1 << (shape.n - 1).bit_length())
    wide_band = band(shape.kw) > 2 and columns.offset
    narrow = is_narrow(shape, columns)
    if columns.inputs == 1:
        tiles, settings = 4, [(2, 2, 1, 8) if narrow else (4, 4, 2, 3), (4, 4, 1, 1)]
    elif columns.inputs == 2:
        tiles, settings = 4, [(4, 4, 3, 2), (4, 4, 1, 1)]
    else:
        tiles, settings = 1 if shape.kh <= 8 or wide_band else 2, [(12, 4, 2, 1), (12, 4, 1, 1)]
    # Of 16 images a tile has one row each: the rows of a task would not follow each other, and could not be staged.
    sizes = (8, 4, 2, 1) if narrow else (16, 8, 4, 2, 1)
    for warps, producers, stages, blocks in settings:
        for images in (size for size in sizes if size <= most):
            for groups in _groups(shape, images) if columns.inputs <= 2 else (1,):
                tile = ForwardTile(images, tiles, groups, warps, producers, stages, blocks)
                if images == 1 or _forward_fits(shape, gpu, tile, columns, shape.h):
                    tile = _spread(shape, gpu, tile, columns)
                    if _forward_fits(shape, gpu, tile, columns, min(shape.h, _row_step(tile))):
                        return tile
    raise NotImplementedError(too_large(shape, gpu))


def forward_tiles(shape: Shape, gpu: Gpu) -> tuple[ForwardTile, ...]:
    """The default tile and, behind it, others that tuning should measure: each differs from the default in one respect.

    Raises:
        NotImplementedError: no tile fits the GPU's shared memory.
    """
    default, columns = default_forward_tile(shape, gpu), columns_of(shape.w, shape.kw)
    low, high = deltas(shape.kw, columns)

    def fits(tile: ForwardTile) -> bool:
        # As the kernel estimates it where it decides how far to load ahead; narrow maps need fewer addresses.
        fragments = (2 if tile.images >= 8 else 4) * (high - low + 1)
        registers = (40 if is_narrow(shape, columns) else 44) + tile.tiles * (4 * columns.outputs + fragments)
        return feasible(forward_plan(shape, gpu, tile).launch, gpu, tile.blocks, registers)

    return offered(default, _forward_variations(shape, columns, default), fits)


def _forward_variations(shape: Shape, columns: Columns, default: ForwardTile) -> Iterator[ForwardTile]:
    for images in (default.images * 2, default.images // 2):
        if images in (1, 2, 4, 8, 16) and images < 2 * shape.n:
            yield replace(default, images=images, groups=max(1, default.groups * default.images // images))
    for tiles in (1, 2, 4):
        yield replace(default, tiles=tiles)
    if columns.inputs <= 2:
        for groups in (default.groups * 2, default.groups // 2):
            if groups in _groups(shape, default.images):
                yield replace(default, groups=groups)
        settings = (4, 4, 2, 3), (4, 4, 3, 2), (8, 4, 2, 2), (4, 2, 2, 4), (4, 4, 1, 4), (8, 4, 3, 1)
        if is_narrow(shape, columns) and columns.inputs == 1:
            settings = (2, 2, 2, 8), (4, 4, 2, 4), *settings
    else:
        settings = (8, 4, 2, 1), (12, 4, 1, 1), (8, 4, 3, 1), (4, 4, 1, 2), (8, 8, 2, 1), (12, 4, 2, 1), (4, 4, 2, 1)
    for warps, producers, stages, blocks in settings:
        yield replace(default, warps=warps, producers=producers, stages=stages, blocks=blocks)


def offered(default: AnyTile, others: Iterable[AnyTile], fits: Callable[[AnyTile], bool]) -> tuple[AnyTile, ...]:
    """The default and the first of the others that fit, with half as many blocks if need be; at most `MOST_TILES`."""
    halved = (tile if fits(tile) else replace(tile, blocks=max(1, tile.blocks // 2)) for tile in others)
    new = (tile for tile in dict.fromkeys(halved) if tile != default and fits(tile))
    return (default, *islice(new, MOST_TILES - 1))


def feasible(launch: Launch, gpu: Gpu, blocks: int, registers: int) -> bool:
    """Whether so many blocks of a launch fit a multiprocessor: shared memory, threads, and registers a thread."""
    return (
        launch.shared_bytes <= budget(gpu, blocks)
        and launch.block <= THREADS
        and launch.block * blocks <= THREADS_OF_MULTIPROCESSOR
        and registers <= min(255, 65536 // (blocks * round_up(launch.block, 128)))
    )


def _spread(shape: Shape, gpu: Gpu, tile: ForwardTile, columns: Columns) -> ForwardTile:
    """Fewer tiles and images an item where there are too few tasks to fill the multiprocessors."""
    tasks = (
        shape.c
        * columns.tiles
        * math.ceil(shape.n / tile.images)
        * math.ceil(shape.h / (16 // tile.images * tile.tiles))
    )
    if tasks >= 8 * gpu.multiprocessors:
        return tile
    return ForwardTile(tile.images, 1, 1, min(4, tile.warps), min(4, tile.producers), tile.stages, tile.blocks)


def _groups(shape: Shape, images: int) -> tuple[int, ...]:
    """Groups an item: up to 64 images, so that a channel's table is built once for many small images."""
    most = max(1, min(64, shape.n) // images)
    return tuple(g for g in (64, 32, 16, 8, 4, 2, 1) if g <= most)


def _row_step(tile: ForwardTile | WeightGradTile) -> int:
    return max(2, 16 // tile.images) * (tile.tiles if isinstance(tile, ForwardTile) else 2)


def budget(gpu: Gpu, blocks: int) -> int:
    """Shared memory of one of several blocks on a multiprocessor, which reserves 1 KiB for each."""
    return gpu.shared_bytes if blocks == 1 else (gpu.shared_bytes + 1024) // blocks - 1024


def too_large(shape: Shape, gpu: Gpu) -> str:
    """The reason why no tile fits."""
    return (
        f"a {shape.kh}x{shape.kw} kernel on {shape.h}x{shape.w} maps in {shape.dtype} needs more shared memory than "
        f"the {gpu.shared_bytes} bytes of this GPU ({gpu.arch})"
    )


def _item_rows(shape: Shape, gpu: Gpu, tile: ForwardTile, columns: Columns) -> int:
    """Output rows of an item: all, or as many as leave room for the stages and work for every multiprocessor."""
    items = shape.c * columns.tiles * math.ceil(shape.n / (tile.images * tile.groups))
    step = _row_step(tile)
    cuts = math.ceil(gpu.multiprocessors / items)
    rows = min(shape.h, round_up(math.ceil(shape.h / cuts), step))
    while rows > step and not _forward_fits(shape, gpu, tile, columns, rows):
        rows = min(round_up(rows // 2, step), rows - 1)
    return rows


def _forward_fits(shape: Shape, gpu: Gpu, tile: ForwardTile, columns: Columns, rows: int) -> bool:
    return _forward_shared(shape, columns, tile, rows) <= budget(gpu, tile.blocks)


def _forward_shared(shape: Shape, columns: Columns, tile: ForwardTile, rows: int) -> int:
    stage, _ = _forward_stage(shape, columns, tile, rows)
    staging = tile.warps * staging_bytes(shape, columns, tile)
    return HEAD + round_up(columns.inputs * 16, 128) + tile.stages * stage + staging


def _forward_stage(shape: Shape, columns: Columns, tile: ForwardTile, rows: int) -> tuple[int, int]:
    window = min(shape.h, rows + 2 * (shape.kh // 2))
    _, stride = image_stride(window, columns.inputs, tile.images)
    table = table_bytes(shape.kh, shape.kw, columns, shape.planes)
    return table + shape.planes * stride * tile.images * tile.groups, stride


def weight_grad_plan(shape: Shape, gpu: Gpu, tile: WeightGradTile | None = None) -> WeightGradPlan:
    """The launch for one weight gradient."""
    tile = tile or default_weight_grad_tile(shape, gpu)
    columns, images = columns_of(shape.w, shape.kw), tile.images * tile.groups
    rows = _weight_grad_rows(shape, gpu, tile, columns)
    _, x_stride, y_stride = _weight_grad_stage(shape, columns, tile, rows)
    warps = _weight_grad_warps(shape, tile)
    template = (
        DTYPES[shape.dtype], shape.planes, shape.kh, shape.kw, columns.inputs, columns.outputs, columns.offset,
        tile.images, tile.pairs, tile.shared, copy_width(shape), warps, tile.producers, tile.stages, tile.blocks,
    )  # fmt: skip
    items = columns.tiles * math.ceil(shape.h / rows) * math.ceil(shape.n / images)
    splits = splits_of(shape.c, items, gpu.multiprocessors * tile.blocks)
    launch = Launch(
        WEIGHT_GRAD,
        f"weight_grad_nchw<{', '.join(map(str, template))}>",
        (shape.c, splits, 1),
        (warps + tile.producers) * 32,
        _weight_grad_shared(shape, columns, tile, rows),
    )
    return WeightGradPlan(launch, images, rows, x_stride, y_stride, splits)


def default_weight_grad_tile(shape: Shape, gpu: Gpu) -> WeightGradTile:
    """Tile chosen by rule; the rules follow measurements on an H100 (`benchmarks/results/`).

    Raises:
        NotImplementedError: no tile fits the GPU's shared memory.
    """
    columns, most = columns_of(shape.w, shape.kw), min(16, 1 << (shape.n - 1).bit_length())
    pairs, wide = (shape.kh + 1) // 2, band(shape.kw) > 2
    if columns.inputs == 1:
        a_warp, wanted, settings = 4, 2, [(2, 1, 8), (2, 1, 4), (2, 1, 1)]
    elif columns.inputs == 2:
        a_warp = 4 if wide else 7
        # Four blocks of more than two warps would leave too few registers for the accumulators.
        blocks = 4 if pairs <= 2 * a_warp else 2
        wanted, settings = 2, [(2, 3, blocks), (2, 1, 1)]
    elif columns.inputs <= 4:
        a_warp, wanted, settings = 2 if wide else 4, 4, [(2, 3, 2), (2, 1, 1)]
    else:
        a_warp, wanted, settings = 2, 8, [(4, 2, 1), (4, 1, 1)]
    a_warp = min(max(a_warp, math.ceil(pairs / 16)), pairs)
    slices = max(1, wanted // math.ceil(pairs / a_warp))
    for producers, stages, blocks in settings:
        for images in (size for size in (16, 8, 4, 2, 1) if size <= most):
            for groups in _groups(shape, images) if columns.inputs == 1 else (1,):
                tile = WeightGradTile(
                    images, a_warp, 2 if images >= 8 else 1, groups, slices, producers, stages, blocks
                )
                rows = shape.h if images > 1 else min(shape.h, _row_step(tile))
                if _weight_grad_fits(shape, gpu, tile, columns, rows):
                    return tile
    raise NotImplementedError(too_large(shape, gpu))


def weight_grad_tiles(shape: Shape, gpu: Gpu) -> tuple[WeightGradTile, ...]:
    """As `forward_tiles`."""
    default, columns = default_weight_grad_tile(shape, gpu), columns_of(shape.w, shape.kw)
    low, high = deltas(shape.kw, columns)

    def fits(tile: WeightGradTile) -> bool:
        registers = 44 + 4 * tile.pairs * (high - low + 1) + 4 * tile.shared * math.ceil(columns.outputs / 2)
        return feasible(weight_grad_plan(shape, gpu, tile).launch, gpu, tile.blocks, registers)

    return offered(default, _weight_grad_variations(shape, columns, default), fits)


def _weight_grad_variations(shape: Shape, columns: Columns, default: WeightGradTile) -> Iterator[WeightGradTile]:
    for images in (default.images * 2, default.images // 2):
        if images in (1, 2, 4, 8, 16) and images < 2 * shape.n:
            groups = max(1, default.groups * default.images // images)
            yield replace(default, images=images, shared=2 if images >= 8 else 1, groups=groups)
    if default.images >= 8:
        yield replace(default, shared=3 - default.shared)
    warps, all_pairs = _weight_grad_warps(shape, default), (shape.kh + 1) // 2
    for pairs in (math.ceil(default.pairs / 2), min(all_pairs, 2 * default.pairs)):
        yield replace(default, pairs=pairs, slices=max(1, warps // math.ceil(all_pairs / pairs)))
    for slices in (default.slices * 2, default.slices // 2):
        if slices:
            yield replace(default, slices=slices)
    if columns.inputs == 1:
        for groups in (default.groups * 2, default.groups // 2):
            if groups in _groups(shape, default.images):
                yield replace(default, groups=groups)
    narrow = (2, 3, 2), (2, 1, 4), (2, 2, 4), (4, 2, 2), (2, 1, 8)
    for producers, stages, blocks in narrow if columns.inputs <= 4 else ((4, 3, 1), (2, 2, 1), (4, 1, 2), (8, 2, 1)):
        yield replace(default, producers=producers, stages=stages, blocks=blocks)


def _weight_grad_rows(shape: Shape, gpu: Gpu, tile: WeightGradTile, columns: Columns) -> int:
    rows, step = shape.h, _row_step(tile)
    while rows > step and not _weight_grad_fits(shape, gpu, tile, columns, rows):
        rows = min(round_up(rows // 2, step), rows - 1)
    return rows


def _weight_grad_fits(shape: Shape, gpu: Gpu, tile: WeightGradTile, columns: Columns, rows: int) -> bool:
    return _weight_grad_shared(shape, columns, tile, rows) <= budget(gpu, tile.blocks)


def _weight_grad_shared(shape: Shape, columns: Columns, tile: WeightGradTile, rows: int) -> int:
    stage, _, _ = _weight_grad_stage(shape, columns, tile, rows)
    zero = round_up(max(columns.inputs, columns.outputs + 1) * 16, 128)
    # The fragments of two column blocks are loaded at once: the last may reach 16 bytes past the stage.
    return HEAD + zero + max(tile.stages * stage, _reduction_bytes(shape, columns, tile)) + 128


def _weight_grad_stage(shape: Shape, columns: Columns, tile: WeightGradTile, rows: int) -> tuple[int, int, int]:
    window = min(shape.h, rows + 2 * (shape.kh // 2))
    _, x_stride = image_stride(window, columns.inputs, tile.images)
    _, y_stride = image_stride(rows, columns.outputs, tile.images)
    return shape.planes * (x_stride + y_stride) * tile.images * tile.groups, x_stride, y_stride


def _weight_grad_warps(shape: Shape, tile: WeightGradTile) -> int:
    return math.ceil((shape.kh + 1) // 2 / tile.pairs) * tile.slices


def _reduction_bytes(shape: Shape, columns: Columns, tile: WeightGradTile) -> int:
    (low, high), warps = deltas(shape.kw, columns), _weight_grad_warps(shape, tile)
    rows = warps * tile.pairs * 2
    return (rows * shape.kw + 1 + warps * diagonal_floats(low, high)) * 4


def diagonal_floats(low: int, high: int) -> int:
    """Shared memory, in floats, that a warp sums the diagonals of two kernel rows in: 16 lines, 8 floats a block."""
    return 16 * 8 * ((high - low + 1) | 1)


def splits_of(channels: int, items: int, slots: int) -> int:
    """Blocks a channel: the fewest that keep the multiprocessors within a tenth of evenly busy, at most one an item."""
    best, best_waste = 1, math.inf
    for splits in range(1, min(items, 65535, max(1, 4 * slots // channels) + 1) + 1):
        rounds = math.ceil(channels * splits / slots)
        waste = rounds * math.ceil(items / splits) * slots / (channels * items)
        if waste < best_waste - 0.1:
            best, best_waste = splits, waste
    return best


def round_up(value: int, step: int) -> int:
    """The next multiple of step."""
    return math.ceil(value / step) * step
