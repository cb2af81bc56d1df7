"""From a small kernel's weight gradient in channels_last to a launch of `diagonal.cu`; others: see `_plan.py`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from replknet.ops.cuda._launch import Gpu, Launch
from replknet.ops.cuda._plan import DTYPES, Shape, SmallKernelPlan, budget, round_up, splits_of, too_large

DIAGONAL = ("common.cuh", "diagonal.cu")
MOST_TAPS, LONGEST = 49, 11
# Warps of a block: more would leave too few registers for those that load.
MOST_WARPS = 20
LOADERS = 2
BARRIERS = 256
# Slots of the ring: so many, and no more than hold what keeps memory busy, in bytes.
MOST_SLOTS, IN_FLIGHT = 12, 65536
# Cycles of a multiprocessor's scheduler for a product, and bytes that it moves in a cycle; cycles in which a step waits
# for barriers and shared memory, and an item for its first rows.
PRODUCT, BYTES, STEP, ITEM = 6.4, 13.0, 200, 1000


@dataclass(frozen=True)
class DiagonalTile:
    """Tuning parameters of the kernel.

    Attributes:
        units: units of 8 columns of a block.
        groups: groups of 8 channels of a block; units times groups warps multiply.
        rows: rows of a stream.
        steps: steps of a slot of the ring.
    """

    units: int
    groups: int
    rows: int
    steps: int


def suits(shape: Shape) -> bool:
    """Whether the kernel takes a weight gradient in channels_last: where it was the fastest on an H200.

    It needs 16-bit channels that can be read eight at a time. Microseconds against the best of the others, 7x7: 255 to
    336 on 64,384,64², 77 to 90 on 64,128,56², 43 to 64 on 64,256,28², 26 to 53 on 64,512,14². 5x5: 47 to 58 on
    64,128,56², but 37 to 33 on 64,256,28²; 3x3 160 to 115 on 64,128,112².
    """
    taps = shape.kh * shape.kw
    if taps > MOST_TAPS or max(shape.kh, shape.kw) > LONGEST:
        return False
    if shape.dtype == torch.float32 or shape.c % 8 or shape.align < 16:
        return False
    return taps > 25 or (taps > 9 and shape.h * shape.w >= 2048)


def weight_grad_plan(shape: Shape, gpu: Gpu, tile: DiagonalTile | None = None) -> SmallKernelPlan:
    """The launch for one weight gradient.

    Raises:
        NotImplementedError: no tile fits the GPU's shared memory.
    """
    tile = tile or default_tile(shape, gpu)
    channel_blocks, splits = _grid(shape, gpu, tile)
    template = (DTYPES[shape.dtype], shape.kh, shape.kw, tile.units, tile.groups, tile.steps, LOADERS)
    slots, sums = _slots(shape, gpu, tile), tile.units * tile.groups * 8 * shape.kh * shape.kw * 4
    launch = Launch(
        DIAGONAL,
        f"weight_grad_diagonal<{', '.join(map(str, template))}>",
        (channel_blocks, splits, 1),
        (tile.units * tile.groups + LOADERS) * 32,
        BARRIERS + max(sums, slots * _slot_bytes(shape, tile)),
    )
    return SmallKernelPlan(launch, (shape.n, shape.c, shape.h, shape.w, tile.rows, slots), splits)


def default_tile(shape: Shape, gpu: Gpu) -> DiagonalTile:
    """The tile with the least estimated time.

    Raises:
        NotImplementedError: no tile fits the GPU's shared memory.
    """
    if not (found := list(_tiles(shape, gpu))):
        raise NotImplementedError(too_large(shape, gpu))
    return min(found, key=lambda tile: _time(shape, gpu, tile))


def _tiles(shape: Shape, gpu: Gpu) -> Iterator[DiagonalTile]:
    most = _most_warps(shape)
    all_units, all_groups = math.ceil(shape.w / 8), math.ceil(shape.c / 8)
    # The widest first: of equal estimates the first is taken, and a wide block reads the least halo.
    for units in range(min(8, most, all_units), 0, -1):
        for groups in (size for size in range(1, most // units + 1) if all_groups % size == 0):
            for parts in (size for size in (1, 2, 3, 4, 6, 8, 12, 16) if size <= shape.h):
                rows = math.ceil(shape.h / parts)
                # More steps a slot where a stream has many: a slot that is not filled waits all the same.
                tile = DiagonalTile(units, groups, rows, 4 if rows >= 32 else 2)
                if _slots(shape, gpu, tile) >= 2:
                    yield tile


def _most_warps(shape: Shape) -> int:
    """Warps that multiply, so that every thread has the registers that it needs, estimated."""
    registers = 4 * shape.kh * math.ceil(shape.kw / 2) + 2 * shape.kh + 40
    # Registers are given to four warps at a time.
    return 4 * min(MOST_WARPS // 4, 65536 // (128 * round_up(registers, 8))) - LOADERS


def _slot_bytes(shape: Shape, tile: DiagonalTile) -> int:
    """Rows of both streams, of x with the kernel's halo and of dy."""
    return tile.steps * 2 * (16 * tile.units + shape.kw - 1) * (tile.groups | 1) * 16


def _slots(shape: Shape, gpu: Gpu, tile: DiagonalTile) -> int:
    slot = _slot_bytes(shape, tile)
    return min(MOST_SLOTS, (budget(gpu, 1) - BARRIERS) // slot, max(4, IN_FLIGHT // slot))


def _items(shape: Shape, tile: DiagonalTile) -> int:
    """Pairs of streams, and their column tiles, of one block of channels."""
    return math.ceil(shape.n * math.ceil(shape.h / tile.rows) / 2) * math.ceil(math.ceil(shape.w / 8) / tile.units)


def _grid(shape: Shape, gpu: Gpu, tile: DiagonalTile) -> tuple[int, int]:
    """Blocks of channels, and blocks that share the items of each."""
    channel_blocks = math.ceil(shape.c / (8 * tile.groups))
    return channel_blocks, splits_of(channel_blocks, _items(shape, tile), gpu.multiprocessors)


def _time(shape: Shape, gpu: Gpu, tile: DiagonalTile) -> float:
    """Estimated cycles of the busiest multiprocessor."""
    channel_blocks, splits = _grid(shape, gpu, tile)
    rounds = math.ceil(channel_blocks * splits / gpu.multiprocessors)
    products = shape.kh * math.ceil(shape.kw / 2) * PRODUCT
    # A single group is half of what memory moves at once.
    moved = 32 * tile.groups * (16 * tile.units + shape.kw - 1) * (2 if tile.groups == 1 else 1)
    step = max(math.ceil(tile.units * tile.groups / 4) * products, moved / BYTES, products + STEP)
    item = min(shape.h, tile.rows + shape.kh - 1) * step + ITEM
    return rounds * math.ceil(_items(shape, tile) / splits) * item
