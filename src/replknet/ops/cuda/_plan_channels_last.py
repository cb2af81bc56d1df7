"""From a channels_last problem to a launch; see `_plan.py` for the contiguous one."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from replknet.ops.cuda._launch import Gpu, Launch
from replknet.ops.cuda._plan import (
    DTYPES,
    FORWARD,
    HEAD,
    WEIGHT_GRAD,
    Columns,
    Shape,
    band,
    budget,
    columns_of,
    deltas,
    image_stride,
    round_up,
    splits_of,
    table_bytes,
    too_large,
)

CHANNELS_LAST = (*FORWARD, *WEIGHT_GRAD[1:], "channels_last.cu")


@dataclass(frozen=True)
class Tile:
    """Tuning parameters of both kernels.

    Attributes:
        columns: how the columns are cut.
        images: images of a tile (8, 4, 2 or 1); its other lanes are rows.
        tiles: row tiles of a warp (forward), or kernel row pairs of a warp (weight gradient).
        groups: groups of `images` of an item.
        rows: output rows of an item.
        producers, stages, blocks: producer warps, stages of pixels, blocks a multiprocessor.
    """

    columns: Columns
    images: int
    tiles: int
    groups: int
    rows: int
    producers: int
    stages: int
    blocks: int


@dataclass(frozen=True)
class ForwardPlan:
    """A launch of the forward kernel and its tile arguments."""

    launch: Launch
    item_images: int
    item_rows: int
    stride: int
    plane: int


@dataclass(frozen=True)
class WeightGradPlan:
    """A launch of the weight-gradient kernel, its tile arguments, and the number of partial sums to add."""

    launch: Launch
    item_images: int
    item_rows: int
    x_stride: int
    y_stride: int
    x_plane: int
    y_plane: int
    splits: int


def forward_plan(shape: Shape, gpu: Gpu, tile: Tile | None = None) -> ForwardPlan:
    """The launch for one forward convolution or input gradient.

    Raises:
        NotImplementedError: float32, or no tile fits the GPU's shared memory.
    """
    tile = tile or _first_that_fits(_forward_tiles(shape, gpu), _forward_shared, shape, gpu)
    stride, plane = _planes(shape, tile, _window(shape, tile.rows), tile.columns.inputs)
    columns = tile.columns
    template = (
        DTYPES[shape.dtype], shape.kh, shape.kw, columns.inputs, columns.outputs, columns.offset,
        tile.images, tile.tiles, _copy_width(shape), tile.producers, tile.stages, tile.blocks,
    )  # fmt: skip
    channel_blocks, slots = math.ceil(shape.c / 8), gpu.multiprocessors * tile.blocks
    items = channel_blocks * _items(shape, tile)
    # Blocks that walk the images together, each with its own channels, share the sectors in which several channel
    # blocks lie: without that, memory traffic is up to four times as high.
    grid = min(items, slots // channel_blocks * channel_blocks or slots)
    launch = Launch(
        CHANNELS_LAST,
        f"forward_nhwc<{', '.join(map(str, template))}>",
        (grid, 1, 1),
        (8 + tile.producers) * 32,
        _forward_shared(shape, tile),
    )
    return ForwardPlan(launch, tile.images * tile.groups, tile.rows, stride, plane)


def weight_grad_plan(shape: Shape, gpu: Gpu, tile: Tile | None = None) -> WeightGradPlan:
    """The launch for one weight gradient.

    Raises:
        NotImplementedError: float32, or no tile fits the GPU's shared memory.
    """
    tile = tile or _first_that_fits(_weight_grad_tiles(shape), _weight_grad_shared, shape, gpu)
    x_stride, x_plane = _planes(shape, tile, _pair_window(shape, tile), tile.columns.inputs)
    y_stride, y_plane = _planes(shape, tile, tile.rows, tile.columns.outputs)
    columns = tile.columns
    template = (
        DTYPES[shape.dtype], shape.kh, shape.kw, columns.inputs, columns.outputs, columns.offset,
        tile.images, tile.tiles, 2 if tile.images == 8 else 1, _copy_width(shape),
        tile.producers, tile.stages, tile.blocks,
    )  # fmt: skip
    channel_blocks, row_groups = math.ceil(shape.c / 8), math.ceil((shape.kh + 1) // 2 / tile.tiles)
    splits = splits_of(channel_blocks * row_groups, _items(shape, tile), gpu.multiprocessors * tile.blocks)
    launch = Launch(
        CHANNELS_LAST,
        f"weight_grad_nhwc<{', '.join(map(str, template))}>",
        (channel_blocks, splits, row_groups),
        (8 + tile.producers) * 32,
        _weight_grad_shared(shape, tile),
    )
    return WeightGradPlan(launch, tile.images * tile.groups, tile.rows, x_stride, y_stride, x_plane, y_plane, splits)


def _first_that_fits(tiles: Iterator[Tile], shared, shape: Shape, gpu: Gpu) -> Tile:
    if shape.dtype == torch.float32:
        raise NotImplementedError("float32 has no channels_last kernel")
    for tile in tiles:
        if shared(shape, tile) <= budget(gpu, tile.blocks):
            return tile
    raise NotImplementedError(too_large(shape, gpu))


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


def _forward_tiles(shape: Shape, gpu: Gpu) -> Iterator[Tile]:
    for columns in _column_cuts(shape):
        most_tiles = min(7, 32 // columns.outputs)
        producers, small = 2 if columns.outputs > 6 else 4, columns.inputs == 1
        for images in _image_counts(shape):
            lanes = 16 // images
            if lanes * most_tiles < shape.h:
                continue
            for groups in (4, 2, 1) if columns.inputs <= 2 else (1,):
                blocks = 2 if small else 1
                enough = math.ceil(shape.n / (images * groups)) * math.ceil(shape.c / 8) >= gpu.multiprocessors * blocks
                if groups == 1 or enough:
                    tile = Tile(columns, images, math.ceil(shape.h / lanes), groups, shape.h, producers, 2, blocks)
                    yield tile
                    yield replace(tile, stages=1, blocks=1)
        for tiles in range(most_tiles, 0, -1):
            yield Tile(columns, 1, tiles, 1, min(shape.h, 16 * tiles), producers, 1, 1)


def _weight_grad_tiles(shape: Shape) -> Iterator[Tile]:
    for columns in _column_cuts(shape):
        low, high = deltas(shape.kw, columns)
        pairs = min((shape.kh + 1) // 2, max(1, 21 // (high - low + 1)), 7)
        for images in _image_counts(shape):
            for groups in (4, 2, 1) if columns.inputs == 1 else (1,):
                if images * groups <= max(images, shape.n):
                    tile = Tile(columns, images, pairs, groups, shape.h, 4, 2, 1)
                    yield tile
                    yield replace(tile, stages=1)
        rows = shape.h
        while rows > 16:
            rows = round_up(rows // 2, 16)
            yield Tile(columns, 1, pairs, 1, rows, 4, 1, 1)


def _items(shape: Shape, tile: Tile) -> int:
    return math.ceil(shape.n / (tile.images * tile.groups)) * math.ceil(shape.h / tile.rows) * tile.columns.tiles


def _copy_width(shape: Shape) -> int:
    return max(2, min(16, shape.align))


def _window(shape: Shape, rows: int) -> int:
    return min(shape.h, rows + 2 * (shape.kh // 2))


def _pair_window(shape: Shape, tile: Tile) -> int:
    return min(shape.h, tile.rows + min(shape.kh, 2 * tile.tiles) - 1)


def _planes(shape: Shape, tile: Tile, rows: int, blocks: int) -> tuple[int, int]:
    """Bytes between images and between the planes of two channels, the latter 16 modulo 128."""
    _, stride = image_stride(rows, blocks, tile.images)
    slots = stride * tile.images * tile.groups // 16
    return stride, (slots + (1 - slots) % 8) * 16


def _pixels(tile: Tile, rows: int, blocks: int) -> int:
    return tile.images * tile.groups * rows * blocks * 8 * 16


def _forward_shared(shape: Shape, tile: Tile) -> int:
    columns, window = tile.columns, _window(shape, tile.rows)
    _, plane = _planes(shape, tile, window, columns.inputs)
    tables = 8 * table_bytes(shape.kh, shape.kw, columns, 1)
    fixed = HEAD + round_up(columns.inputs * 16, 128) + tables + round_up(8 * plane, 128)
    return fixed + tile.stages * _pixels(tile, window, columns.inputs)


def _weight_grad_shared(shape: Shape, tile: Tile) -> int:
    columns, window = tile.columns, _pair_window(shape, tile)
    _, x_plane = _planes(shape, tile, window, columns.inputs)
    _, y_plane = _planes(shape, tile, tile.rows, columns.outputs)
    low, high = deltas(shape.kw, columns)
    stage = _pixels(tile, window, columns.inputs) + _pixels(tile, tile.rows, columns.outputs)
    work = round_up(8 * x_plane, 128) + round_up(8 * y_plane + 128, 128) + tile.stages * stage
    reduction = 8 * ((high - low + 1) * 64 + 2 * tile.tiles * shape.kw) * 4
    return HEAD + round_up(max(columns.inputs, columns.outputs + 1) * 16, 128) + max(work, reduction)
