"""From a channels_last problem with a small kernel to a launch of `direct.cu`; see `_plan.py` for the others."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from replknet.ops.cuda._launch import Gpu, Launch
from replknet.ops.cuda._plan import DTYPES, Shape, SmallKernelPlan, splits_of

DIRECT = ("common.cuh", "direct.cu")
THREADS = 128
# A thread's registers hold the taps of two channels and the sums of as many rows as the kernel has.
MOST_TAPS, LONGEST, MOST_SUMS, MOST_REGISTERS = 49, 11, 40, 230
# What a row costs beside its instructions, waiting for memory included, in instructions.
ROW_OVERHEAD = 150


@dataclass(frozen=True)
class DirectTile:
    """Tuning parameters of both kernels.

    Attributes:
        columns: columns of a strip.
        rows: rows that a thread walks down.
        blocks: blocks of 128 threads a multiprocessor, which bounds a thread's registers.
    """

    columns: int
    rows: int
    blocks: int


def suits(shape: Shape, *, weight_grad: bool) -> bool:
    """Whether these kernels take a channels_last problem: where they were faster than `channels_last.cu` on an H100.

    5x5 on 64,512,14²: 14 us instead of 28, weight gradient 18 instead of 43; 7x7 on 64,128,56²: 115 instead of 81, but
    the weight gradient on 64,1024,7² 23 instead of 56. float32 takes three to six products on tensor cores, here one.
    `diagonal.cu` goes first where it can run.
    """
    taps = shape.kh * shape.kw
    if taps > MOST_TAPS or max(shape.kh, shape.kw) > LONGEST:
        return False
    return taps <= 25 or shape.dtype == torch.float32 or (weight_grad and shape.h * shape.w <= 196)


def forward_plan(shape: Shape, gpu: Gpu, flags: int, tile: DirectTile | None = None) -> SmallKernelPlan:
    """The launch for one forward convolution or input gradient; `flags` as in `direct.cu`."""
    tile = tile or default_tile(shape, gpu)
    lanes, channel_blocks = _lanes(shape)
    threads = THREADS // lanes
    strip_blocks = math.ceil(shape.n * math.ceil(shape.w / tile.columns) / threads)
    launch = Launch(
        DIRECT,
        f"forward_direct<{_template(shape, tile)}, {flags}, {tile.blocks}>",
        (strip_blocks * math.ceil(shape.h / tile.rows) * channel_blocks, 1, 1),
        threads * lanes,
        2 * lanes * shape.kh * shape.kw * _size(shape),
    )
    return SmallKernelPlan(launch, (shape.n, shape.h, shape.w, tile.rows))


def weight_grad_plan(shape: Shape, gpu: Gpu, tile: DirectTile | None = None) -> SmallKernelPlan:
    """The launch for one weight gradient."""
    tile = tile or default_tile(shape, gpu, weight_grad=True)
    lanes, channel_blocks = _lanes(shape)
    threads = THREADS // lanes
    items = math.ceil(shape.n * math.ceil(shape.w / tile.columns) / threads) * math.ceil(shape.h / tile.rows)
    splits = splits_of(channel_blocks, items, gpu.multiprocessors * tile.blocks)
    launch = Launch(
        DIRECT,
        f"weight_grad_direct<{_template(shape, tile)}, {tile.blocks}>",
        (channel_blocks, splits, 1),
        threads * lanes,
        2 * lanes * shape.kh * shape.kw * 4,
    )
    return SmallKernelPlan(launch, (shape.n, shape.h, shape.w, tile.rows), splits)


def _template(shape: Shape, tile: DirectTile) -> str:
    wide = shape.c % 2 == 0 and shape.align >= 2 * _size(shape)
    numbers = (DTYPES[shape.dtype], shape.kh, shape.kw, tile.columns, shape.c, int(_whole(shape, tile)), int(wide))
    return ", ".join(map(str, numbers))


def _size(shape: Shape) -> int:
    return 4 if shape.dtype == torch.float32 else 2


def _lanes(shape: Shape) -> tuple[int, int]:
    """Pairs of channels of a block, evenly many in each, and the number of blocks."""
    pairs = math.ceil(shape.c / 2)
    blocks = math.ceil(pairs / 32)
    return math.ceil(pairs / blocks), blocks


def default_tile(shape: Shape, gpu: Gpu, *, weight_grad: bool = False) -> DirectTile:
    """The tile with the least estimated time."""
    return min(_tiles(shape, gpu, weight_grad=weight_grad), key=lambda tile: _time(shape, gpu, tile))


def _tiles(shape: Shape, gpu: Gpu, *, weight_grad: bool) -> Iterator[DirectTile]:
    lanes, channel_blocks = _lanes(shape)
    for columns in range(1, 9):
        registers = _registers(shape, columns, weight_grad=weight_grad)
        if columns > 1 and (shape.kh * columns > MOST_SUMS or registers > MOST_REGISTERS):
            return
        blocks = max(2, min(5, 65536 // (THREADS * registers)))
        whole = shape.n * math.ceil(shape.w / columns) * channel_blocks * lanes / THREADS
        cuts = max(1, int(gpu.multiprocessors * blocks / whole))
        for rows in {shape.h, min(shape.h, max(shape.kh, math.ceil(shape.h / cuts)))}:
            yield DirectTile(columns, rows, blocks)


def _registers(shape: Shape, columns: int, *, weight_grad: bool) -> int:
    """Registers of a thread, estimated: taps and sums (or rows of dy) as floats, pixels on their way, and the rest."""
    taps = shape.kh * shape.kw
    pixels = 2 * columns + shape.kw - 1 if weight_grad else (columns + shape.kw - 1) * (2 if taps > 15 else 1)
    return 2 * (shape.kh * columns + taps) + pixels * _size(shape) // 2 + 44


def _time(shape: Shape, gpu: Gpu, tile: DirectTile) -> float:
    """Estimated instructions that a scheduler issues one after the other."""
    strips, (lanes, channel_blocks) = math.ceil(shape.w / tile.columns), _lanes(shape)
    blocks = math.ceil(shape.n * strips / (THREADS // lanes)) * math.ceil(shape.h / tile.rows) * channel_blocks
    row = tile.columns * (2 * shape.kh * shape.kw + 4) + 4 * (tile.columns + shape.kw - 1) + ROW_OVERHEAD
    checks = 1.0 if _whole(shape, tile) else 1.15
    rounds = max(1.0, blocks / (gpu.multiprocessors * tile.blocks))
    return rounds * tile.blocks * (tile.rows + shape.kh - 1) * row * checks


def _whole(shape: Shape, tile: DirectTile) -> bool:
    """Whether strips end with the image and the halo of one lies in the next."""
    return shape.w % tile.columns == 0 and tile.columns >= shape.kw // 2
