"""The kernels of ops/cuda in NumPy, with float64 in the place of 16-bit elements.

What the tensor-core instructions do is written after the PTX ISA (sections "Matrix fragments for mma.m16n8k16" and
"ldmatrix"); what the kernels do around them is transcribed from the .cu files, lane by lane. Shared memory is an array
with one value for two bytes, and holds NaN wherever nothing was written.
"""

import functools
import itertools
import math
import random
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch

from replknet.ops.cuda import _plan
from replknet.ops.cuda._plan import columns_of, round_up

# ---- the instructions. Thread `lane` is (g, q) = (lane / 4, lane % 4); a register holds two elements, p = 0 and 1.
LANE = np.arange(32)
G, Q = LANE >> 2, LANE & 3
_p = np.arange(2)
A_ROW = np.stack([np.broadcast_to((G + 8 * (i & 1))[:, None], (32, 2)) for i in range(4)])
A_COL = np.stack([(2 * Q + 8 * (i >> 1))[:, None] + _p for i in range(4)])
B_ROW = np.stack([(2 * Q + 8 * i)[:, None] + _p for i in range(2)])
B_COL = np.stack([np.broadcast_to(G[:, None], (32, 2)) for i in range(2)])
C_ROW = np.stack([G + 8 * (i >> 1) for i in range(4)])
C_COL = np.stack([2 * Q + (i & 1) for i in range(4)])


def ldmatrix(memory, addresses, *, transposed=False):
    """Four 8x8 matrices, row r of matrix i from the address of lane 8 i + r: registers [4, 32 lanes, 2]."""
    assert (addresses % 16 == 0).all()
    assert addresses.min() >= 0
    m = memory[addresses[:, None] // 2 + np.arange(8)].reshape(4, 8, 8)
    pair = 2 * Q[:, None] + _p
    return m[:, pair, G[:, None]] if transposed else m[:, G[:, None], pair]


def mma(acc, a, b):
    """acc [4, 32] += a b."""
    full_a, full_b = np.empty((16, 16)), np.empty((16, 8))
    full_a[A_ROW, A_COL] = a
    full_b[B_ROW, B_COL] = b
    acc += (full_a @ full_b)[C_ROW, C_COL]


def load_words(memory, addresses):
    """32-bit words, two elements each, from every lane's address: [32, 2]."""
    assert (addresses % 4 == 0).all()
    return memory[addresses[:, None] // 2 + _p]


# ---- common.cuh and forward.cu
def band_limits(kw, columns):
    reach = (kw // 2 + 7) // 8
    return max(-reach, 1 - columns.outputs - columns.offset), min(reach, columns.inputs - 1 - columns.offset)


class Table:
    def __init__(self, kh, kw, low, high):
        self.kh, self.kw, self.low, self.p, self.kq = kh, kw, low, kw // 2, (kh + 1) // 2
        t_min, t_max = 8 * low - 7 + self.p, 8 * high + 6 + self.p
        self.offset = (1 - t_min) // 2 * 2 if t_min < 0 else -(t_min // 2) * 2
        self.nu = (t_max + self.offset) // 2 + 1
        self.copy = round_up(self.kq * self.nu * 8, 128) + 64

    def build(self, memory, table, weight, flip, threads):
        """Written by that many threads; `written` proves that no word is written twice."""
        taps, written = weight.reshape(-1), set()
        lanes = 32 if 2 * self.nu > 16 else 16 if 2 * self.nu > 8 else 8
        for tid, t0 in itertools.product(range(threads), range(0, 2 * self.nu, lanes)):
            t = t0 + tid % lanes
            if t >= 2 * self.nu:
                continue
            kx = [t - self.offset, t - self.offset + 1]
            nearest = [min(max(k, 0), self.kw - 1) for k in kx]
            inside = [0 <= k < self.kw for k in kx]
            left, right = (self.kh * self.kw - 1 - k if flip else k for k in nearest)
            row = -self.kw if flip else self.kw
            for q in range(tid // lanes, self.kq, threads // lanes):
                even = taps[left + 2 * q * row], taps[right + 2 * q * row]
                odd = (
                    (taps[left + (2 * q + 1) * row], taps[right + (2 * q + 1) * row]) if 2 * q + 1 < self.kh else (0, 0)
                )
                to = table + (t & 1) * self.copy + (t >> 1) * 8 + q * self.nu * 8
                assert to not in written
                written.add(to)
                memory[to // 2 : to // 2 + 4] = np.where([*inside, *inside], [*even, *odd], 0)

    def lane_offset(self):
        t = 8 * self.low + 2 * Q - G + self.p + self.offset
        assert t.min() >= 0
        return (t & 1) * self.copy + (t >> 1) * 8


class StageRows:
    """Addresses of the lanes' rows and of rows ahead of them; a row of zeros above and below the image."""

    def __init__(self, xs, row, rows, zero, pitch):
        self.at, self.row, self.rows, self.zero, self.pitch = xs + row * pitch, row, rows, zero, pitch

    def address(self, ahead=0):
        row = self.row + ahead
        return np.where((row >= 0) & (row < self.rows), self.at + ahead * self.pitch, self.zero)

    def next(self):
        self.row, self.at = self.row + 2, self.at + 2 * self.pitch


class RingRows:
    """The same in a ring of rows; addresses are 32-bit numbers without a sign."""

    def __init__(self, xs, ring_row, ring_rows, row, rows, zero, pitch):
        self.at = _u32(xs + np.where(ring_row >= ring_rows, ring_row - ring_rows, ring_row) * pitch)
        self.row, self.rows, self.zero, self.pitch = row, rows, zero, pitch
        self.first, self.end, self.bytes = xs, xs + ring_rows * pitch, ring_rows * pitch

    def address(self, ahead=0):
        at, row = _u32(self.at + ahead * self.pitch), self.row + ahead
        at, inside = np.where(at >= self.end, at - self.bytes, at), (row >= 0) & (row < self.rows)
        assert ((at >= self.first) & (at < self.end))[inside].all(), "a row outside the ring"
        return np.where(inside, at, self.zero)

    def next(self):
        self.row, self.at = self.row + 2, _u32(self.at + 2 * self.pitch)
        self.at = np.where(self.at >= self.end, _u32(self.at - self.bytes), self.at)


def _u32(value):
    return np.asarray(value, np.int64) & 0xFFFFFFFF


class Forward:
    """struct Forward; addresses are vectors over the lanes. warps: all of a block."""

    def __init__(self, kh, kw, columns, ni, mt, warps=16, blocks=1):
        self.kh, self.columns, self.ni, self.mt = kh, columns, ni, mt
        self.low, self.high = band_limits(kw, columns)
        self.nd, self.p, self.khp, self.gr = self.high - self.low + 1, kh // 2, (kh + 1) & ~1, 16 // ni
        self.ts = max(2, self.gr)
        self.set_rows, self.set_tasks = (2 * mt, 2) if self.gr == 1 else (self.gr * mt, 1)
        self.pitch = (columns.inputs | 1 if ni < 8 else columns.inputs) * 16
        self.zero = round_up(columns.inputs * 16, 128)
        self.span = self.set_rows * columns.outputs * 16 + 16
        self.table = Table(kh, kw, self.low, self.high)
        self.table_bytes = round_up(2 * self.table.copy, 128)
        self.img, self.off = (LANE & 15) % ni, (LANE & 15) // ni + (LANE >> 4)
        self.window, self.registers = self.ts == 2, min(255, 65536 // (32 * blocks * 4 * math.ceil(warps / 4)))
        spare = self.registers - 44 - mt * columns.outputs * 4 - (2 if self.window else 4) * mt * self.nd
        few = mt != 2 or (self.window and columns.inputs < 7)
        # A division in C++ goes towards zero.
        self.ahead = 1 if few else max(1, min(columns.inputs, int(spare / 4) - 1))
        self.early = not self.window and self.registers - 44 - mt * columns.outputs * 4 - 4 * mt * self.nd >= 0
        self.skips = mt == 1 or (mt == 2 and self.khp >= self.ts)

    def narrow(self, dtype, vector):
        """dtype and vector as in the template."""
        return dtype < 2 and self.columns.inputs <= 2 and vector == 2

    def staging(self, dtype, vector):
        """Bytes of a consumer warp's spans."""
        return self.ni * self.span if self.narrow(dtype, vector) and self.gr > 1 else 0

    def fragments(self, memory, table, e):
        b = np.zeros((self.nd, 2, 32, 2))
        if self.skips:
            e = min(max(e, 0), self.khp - 2)
        if 0 <= e < self.khp:
            for d in range(self.nd):
                at = table + (e >> 1) * (self.table.nu * 8) + d * 32
                assert (at % 8 == 0).all()
                b[d] = load_words(memory, at), load_words(memory, at + 4)
        return b

    def products(self, acc, c, a, b):
        for j in range(self.columns.outputs):
            d = c - self.columns.offset - j - self.low
            if 0 <= d < self.nd:
                mma(acc[j], a, b[d])

    def accumulate(self, memory, acc, rows, table, e, e_end, tiles):
        inputs, row = self.columns.inputs, rows.address()
        a = [ldmatrix(memory, row + c * 16) for c in range(self.ahead)]
        b = [self.fragments(memory, table, e - self.ts * t) for t in range(self.mt)]
        for turn in itertools.cycle(range(self.mt if self.window else 1)):
            rows.next()
            following = rows.address()
            active = range(self.mt)
            if self.mt == 2:
                active = (0,) if e < self.ts or tiles == 1 else (1,) if e >= self.khp else (0, 1)
            for c in range(inputs):
                coming = c + self.ahead
                a.append(ldmatrix(memory, row + coming * 16 if coming < inputs else following + (coming - inputs) * 16))
                for t in active:
                    self.products(acc[t], c, a[0], b[(t - turn) % self.mt])
                a.pop(0)
            row, e = following, e + 2
            if e >= e_end:
                return
            if self.window:
                b[(2 * self.mt - 1 - turn) % self.mt] = self.fragments(memory, table, e)
            else:
                b = [self.fragments(memory, table, e - self.ts * t) for t in range(self.mt)]

    def accumulate_apart(self, memory, acc, rows, table, e, e_end, tiles):
        for step in range(e, e_end, 2):
            row = rows.address()
            for t in range(tiles):
                if 0 <= step - self.ts * t < self.khp:
                    b = self.fragments(memory, table, step - self.ts * t)
                    for c in range(self.columns.inputs):
                        self.products(acc[t], c, ldmatrix(memory, row + c * 16), b)
            rows.next()


def load_rows(memory, to, images, row0, n_rows, left, stride, pitch, blocks):
    """What Loader and to_planes leave behind: rows of columns left .. left + 8 blocks - 1, zeros outside the image."""
    width = images.shape[2]
    for i, image in enumerate(images):
        for r in range(n_rows):
            line = np.zeros(blocks * 8)
            inside = [col for col in range(blocks * 8) if 0 <= left + col < width]
            line[inside] = image[row0 + r, left + inside[0] : left + inside[-1] + 1]
            at = (to + i * stride + r * pitch) // 2
            memory[at : at + blocks * 8] = line


def load_spans(memory, to, x, base, images, n_rows, step, width, stride, pitch, producers, at_once):
    """Loader::spans: x is flat, its first element at a multiple of 16 bytes; the first row begins at `base`."""
    elements, many = n_rows * width, images >= producers
    image_step = producers if many else 2

    def put(image, e, value):
        place = (to + image * stride + e // width * pitch) // 2 + e % width
        assert np.isnan(memory[place]), "an element that is written twice, or a column past the last"
        memory[place] = value

    for warp in range(producers):
        for start in range(warp, warp + 1) if many else range(min(images, 2)):
            for first in range(0 if many else warp * 64, elements + 1, 64 if many else producers * 64):
                odd = (base + start * step) & 1
                for im in range(start, images, at_once * image_step):
                    for b, lane in itertools.product(range(at_once), range(32)):
                        image, e = im + b * image_step, first + 2 * lane - odd
                        if e >= 0 and e + 1 < elements and image < images:
                            at = base + image * step + e
                            assert at % 2 == 0, "a word that is not aligned"
                            put(image, e, x[at])
                            put(image, e + 1, x[at + 1])
                    for lane in range(at_once if first == 0 else 0):
                        mine = im + lane * image_step
                        if mine < images and odd:
                            put(mine, 0, x[base + mine * step])
                        if mine < images and (elements - odd) & 1:
                            put(mine, elements - 1, x[base + mine * step + elements - 1])


class Array:
    """[N, C, H, W] in memory, so many elements behind an aligned one; planes by image or by channel."""

    def __init__(self, shape, start=0, *, by_channel=False):
        (n, c, h, self.width), self.shape, self.start = shape, shape, start
        self.strides = (h * self.width, n * h * self.width) if by_channel else (c * h * self.width, h * self.width)
        self.flat: np.ndarray = np.full(start + math.prod(shape), np.nan)

    def at(self, n, c, h):
        """Where a row begins."""
        return self.start + n * self.strides[0] + c * self.strides[1] + h * self.width

    def planes(self, flat):
        """A flat array of as many elements, as [N, C, H, W]."""
        strides = (*self.strides, self.width, 1)
        return np.lib.stride_tricks.as_strided(flat[self.start :], self.shape, [s * flat.itemsize for s in strides])


class Result(Array):
    """y in global memory: every element is written once."""

    def __init__(self, shape, start=0, *, by_channel=False):
        super().__init__(shape, start, by_channel=by_channel)
        self.writes: np.ndarray = np.zeros(len(self.flat), int)

    def write(self, n, c, h, w, values):
        assert w + len(values) <= self.width, "a store past the end of a row"
        self.put(self.at(n, c, h) + w, values)

    def put(self, at, values):
        assert at % len(values) == 0, "a store that is not aligned"
        self.flat[at : at + len(values)] = values
        self.writes[at : at + len(values)] += 1

    def y(self):
        assert (self.planes(self.writes) == 1).all()
        assert (self.writes[: self.start] == 0).all()
        return self.planes(self.flat)


def exchange(a, b):
    """Pairs [32, 2] of two column blocks to four columns [32, 4] of one."""
    low, odd_lane = (Q < 2)[:, None], (Q & 1 == 1)[:, None]
    keep, got = np.where(low, a, b), np.where(low, b, a)[LANE ^ 2]
    even, odd = np.where(low, keep, got), np.where(low, got, keep)
    got = np.where(odd_lane, even, odd)[LANE ^ 1]
    return np.where(np.tile(odd_lane, 4), np.hstack([got, odd]), np.hstack([even, got]))


def store_half(k, out, acc, half, item, store, h0, group):
    n_images, _, _, width = out.shape
    outputs, left = k.columns.outputs, width - item["col0"]
    m = G + 8 * half
    n, h1 = item["n0"] + group * k.ni + m % k.ni, h0 + m // k.ni
    h_end = np.where(n < n_images, item["row0"] + item["rows"], 0)
    for t in range(k.mt):
        ok = h1 + k.ts * t < h_end
        for j in range(outputs):
            v, first, reach = acc[t, j, 2 * half : 2 * half + 2].T, 8 * j + 2 * Q, left
            if store == 4 and j % 2 == 0 and j + 1 < outputs:
                v = exchange(v, acc[t, j + 1, 2 * half : 2 * half + 2].T)
                first = 8 * j + (Q >> 1) * 8 + (Q & 1) * 4
            elif store == 4 and j % 2:
                continue
            for lane in LANE[ok]:
                for at in range(0, v.shape[1], v.shape[1] if store > 1 else 1):
                    if first[lane] + at < reach:
                        values = v[lane, at:] if store > 1 else v[lane, at : at + 1]
                        col = item["col0"] + first[lane] + at
                        out.write(n[lane], item["c"], h1[lane] + k.ts * t, col, values)


def store_spans(k, memory, buffer, out, acc, item, h0, group):
    """In elements."""
    (n_images, _, _, width), (outputs, span) = out.shape, (k.columns.outputs, k.span // 2)
    n0, rows = item["n0"] + group * k.ni, min(k.set_rows, item["row0"] + item["rows"] - h0)
    first, step, size = out.at(n0, item["c"], h0), out.strides[0], rows * width
    memory[buffer : buffer + k.ni * span] = np.nan
    for half in range(2):
        m = G + 8 * half
        image = m % k.ni
        to = buffer + image * span + ((first + image * step) & 1) + m // k.ni * width + 2 * Q
        for t, j in itertools.product(range(k.mt), range(outputs)):
            v, at, col = acc[t, j, 2 * half : 2 * half + 2].T, to + k.ts * width * t + 8 * j, 8 * j + 2 * Q
            for lane, p in itertools.product(range(32), range(2)):
                if j + 1 < outputs or col[lane] + p < width:
                    place = at[lane] + p
                    assert image[lane] * span <= place - buffer < (image[lane] + 1) * span
                    assert np.isnan(memory[place]), "an element that is written twice"
                    memory[place] = v[lane, p]
    end = size + ((first | step) & 1)
    for i, k0 in itertools.product(range(min(k.ni, n_images - n0)), range(0, end, 2)):
        at = k0 - ((first + i * step) & 1)
        assert k0 + 2 <= span
        v = memory[buffer + i * span + k0 : buffer + i * span + k0 + 2]
        if at >= 0 and at + 2 <= size:
            out.put(first + i * step + at, v)
        elif at < size:
            out.put(first + i * step + max(at, 0), v[1:] if at < 0 else v[:1])


def decode(item, k, plan, shape):
    n_groups, n_rows = math.ceil(shape.n / plan.item_images), math.ceil(shape.h / plan.item_rows)
    n_cols = math.ceil(shape.w / (k.columns.outputs * 8))
    item, g = divmod(item, n_groups)
    item, r = divmod(item, n_rows)
    row0, rest = r * plan.item_rows, {"n0": g * plan.item_images, "c": item // n_cols}
    rows, x0 = min(plan.item_rows, shape.h - row0), max(0, row0 - k.p)
    x_rows = min(shape.h, row0 + rows + k.p) - x0
    col0 = item % n_cols * k.columns.outputs * 8
    return rest | {"row0": row0, "rows": rows, "x0": x0, "x_rows": x_rows, "col0": col0}


def forward_tasks(k, memory, out, item, shape, xs, table, stride, item_images, store, warps, staging, rng):
    """Warps of a block take tasks from the item's counter, in an order of chance; they may lay results out."""
    sets = math.ceil(item["rows"] / k.set_rows) * k.set_tasks
    groups = math.ceil(min(item_images, shape.n - item["n0"]) / k.ni)
    counter, states = 0, [[0, 0, 0, warp] for warp in range(warps)]  # group, set, taken, warp
    while states:
        state = rng.choice(states)
        state[1] += counter - state[2]
        state[2], counter = counter, counter + 1
        while state[1] >= sets and state[0] < groups:
            state[1], state[0] = state[1] - sets, state[0] + 1
        if state[0] >= groups:
            states.remove(state)
            continue
        h0 = item["row0"] + state[1] // k.set_tasks * k.set_rows + state[1] % k.set_tasks
        e0, e1 = max(0, k.p - h0 - k.gr) & ~1, min(k.khp + k.ts * (k.mt - 1), shape.h - h0 + k.p)
        acc = np.zeros((k.mt, k.columns.outputs, 4, 32))
        at = xs + (k.img + state[0] * k.ni) * stride
        rows = StageRows(at, h0 + k.off + e0 - k.p - item["x0"], item["x_rows"], 0, k.pitch)
        k.accumulate(memory, acc, rows, table, e0, e1, k.mt)
        if staging is not None:
            buffer = (staging + state[3] * k.ni * k.span) // 2
            store_spans(k, memory, buffer, out, acc, item, h0, state[0])
            continue
        for half in range(2):
            store_half(k, out, acc, half, item, store, h0, state[0])


def forward_nchw(x, weight, plan, shape, tile, *, flip=False, start=0, by_channel=False):
    """start, by_channel: where x and y lie in memory, as of an `Array`."""
    columns, rng = columns_of(shape.w, shape.kw), random.Random(0)
    warps = tile.warps + tile.producers
    k = Forward(shape.kh, shape.kw, columns, tile.images, tile.tiles, warps, tile.blocks)
    out, given = (kind(x.shape, start, by_channel=by_channel) for kind in (Result, Array))
    given.planes(given.flat)[:] = x
    stages = k.zero + tile.stages * k.table_bytes
    staging = stages + tile.stages * plan.stride * plan.item_images
    vector, store = (int(value) for value in plan.launch.expression.split(", ")[9:11])
    assert plan.launch.shared_bytes == _plan.HEAD + staging + tile.warps * k.staging(0, vector)
    spans = k.narrow(0, vector)
    per_channel = columns.tiles * math.ceil(shape.h / plan.item_rows) * math.ceil(shape.n / plan.item_images)
    items, blocks = per_channel * shape.c, plan.launch.grid[0]
    for block in range(blocks):
        memory = np.full((plan.launch.shared_bytes - _plan.HEAD) // 2, np.nan)
        memory[: k.zero // 2] = 0
        if spans:
            memory[stages // 2 : staging // 2] = 0
        first = items * block // blocks
        for count, number in enumerate(range(first, items * (block + 1) // blocks)):
            s, item = count % tile.stages, decode(number, k, plan, shape)
            table = k.zero + s * k.table_bytes
            xs = stages + s * plan.stride * plan.item_images
            images, left = min(plan.item_images, shape.n - item["n0"]), item["col0"] - 8 * columns.offset
            if spans:
                forget_rows(memory, xs, plan, shape, k.pitch)
                load_spans(
                    memory, xs, given.flat, given.at(item["n0"], item["c"], item["x0"]), images, item["x_rows"],
                    given.strides[0], shape.w, plan.stride, k.pitch, tile.producers, 8 if k.registers < 80 else 16,
                )  # fmt: skip
            else:
                memory[xs // 2 : (xs + plan.stride * plan.item_images) // 2] = np.nan
                planes = x[item["n0"] : item["n0"] + images, item["c"]]
                load_rows(memory, xs, planes, item["x0"], item["x_rows"], left, plan.stride, k.pitch, columns.inputs)
            if count < tile.stages or (number - tile.stages) // per_channel != item["c"]:
                k.table.build(memory, table, weight[item["c"]], flip, tile.producers * 32)
            at = table + k.table.lane_offset()
            forward_tasks(
                k, memory, out, item, shape, xs, at, plan.stride, plan.item_images, store, min(tile.warps, 3),
                staging if k.staging(0, vector) else None, rng,
            )  # fmt: skip
    return out.y()


def forget_rows(memory, xs, plan, shape, pitch):
    """NaN in the place of a stage's rows, but for the columns past the last."""
    for image in range(plan.item_images):
        at = (xs + image * plan.stride) // 2
        for row in range(plan.stride // pitch):
            memory[at + row * pitch // 2 : at + row * pitch // 2 + shape.w] = np.nan


# ---- weight_grad.cu
class WeightGrad:
    """struct WeightGrad."""

    def __init__(self, kh, kw, columns, ni, pairs, shared):
        self.kh, self.kw, self.columns, self.ni, self.r, self.hb = kh, kw, columns, ni, pairs, shared
        self.low, self.high = band_limits(kw, columns)
        self.nd, self.p, self.kq, self.gr = self.high - self.low + 1, kh // 2, (kh + 1) // 2, 16 // ni
        self.jp = math.ceil(columns.outputs / 2)
        self.set_tasks = 2 if self.gr == 1 and shared > 1 else 1
        self.set_rows = self.gr * shared * self.set_tasks
        odd = 1 if ni < 8 else 0
        self.x_pitch, self.y_pitch = (columns.inputs | odd) * 16, (columns.outputs | odd) * 16
        self.zero = round_up(max(columns.inputs, columns.outputs + 1) * 16, 128)
        self.wg = math.ceil(self.kq / pairs)
        self.kx, self.ky = (LANE & 7) + 8 * (LANE >> 4), LANE & 15

    def accumulate(self, memory, acc, rows, ys, y_row, y_rows, zero, q_lo, q_hi):
        dy = np.empty((self.hb, self.jp, 4, 32, 2))
        for b in range(self.hb):
            r = y_row + 2 * b
            at = np.where((r >= 0) & (r < y_rows), ys + r * self.y_pitch, zero) + (LANE >> 4) * 16
            for j in range(self.jp):
                dy[b, j] = ldmatrix(memory, at + j * 32, transposed=True)
        every = q_lo <= 0 and q_hi >= self.r + self.hb - 2
        for q in range(self.r + self.hb - 1):
            if every or q_lo <= q <= q_hi:
                self.multiply(memory, acc, rows.address(2 * q), dy, q)

    def multiply(self, memory, acc, at, dy, q):
        for c in range(self.columns.inputs):
            a = ldmatrix(memory, at + c * 16, transposed=True)
            for b in (b for b in range(self.hb) if 0 <= q - b < self.r):
                for j in range(self.columns.outputs):
                    d = c - self.columns.offset - j - self.low
                    if 0 <= d < self.nd:
                        mma(acc[q - b, d], a, dy[b, j // 2, (j & 1) * 2 : (j & 1) * 2 + 2])

    def reduce(self, acc):
        """Sums of the diagonals: two rows of taps."""
        line = 8 * (self.nd | 1)
        buffer = np.full(_plan.diagonal_floats(self.low, self.high), np.nan)
        assert len(buffer) == 2 * 8 * line
        to = (LANE >> 2) * line + 2 * (LANE & 3)
        for d, half, p in itertools.product(range(self.nd), range(2), range(2)):
            buffer[half * 8 * line + to + 8 * (self.nd - 1 - d) + p] = acc[d, 2 * half + p]
        taps = np.zeros(2 * self.kw)
        for e in range(2 * self.kw):
            half = int(e >= self.kw)
            at = 8 * self.high + self.kw // 2 - (e - half * self.kw)
            taps[e] = sum(buffer[half * 8 * line + at + m * line + m] for m in range(8) if 0 <= at + m < 8 * self.nd)
        return taps.reshape(2, self.kw)


def weight_grad_nchw(x, dy, plan, shape, tile):
    columns = columns_of(shape.w, shape.kw)
    k = WeightGrad(shape.kh, shape.kw, columns, tile.images, tile.pairs, tile.shared)
    warps = plan.launch.block // 32 - tile.producers
    assert k.wg * (warps // k.wg) == warps
    n_groups, n_rows = math.ceil(shape.n / plan.item_images), math.ceil(shape.h / plan.item_rows)
    items = n_groups * n_rows * math.ceil(shape.w / (columns.outputs * 8))
    result = np.zeros((shape.c, shape.kh, shape.kw))
    for c in range(shape.c):
        for split in range(plan.splits):
            acc = np.zeros((warps, k.r, k.nd, 4, 32))
            for item in range(items * split // plan.splits, items * (split + 1) // plan.splits):
                weight_grad_item(k, acc, x[:, c], dy[:, c], item, plan, shape, n_groups, n_rows)
            taps = np.full((warps // k.wg, k.wg * k.r * 2, k.kw), np.nan)
            for warp in range(warps):
                for r in range(k.r):
                    row = ((warp % k.wg) * k.r + r) * 2
                    taps[warp // k.wg, row : row + 2] = k.reduce(acc[warp, r])
            result[c] += taps.sum(0)[: shape.kh]
    return result


def weight_grad_item(k, acc, x, dy, item, plan, shape, n_groups, n_rows):
    n0, row0 = item % n_groups * plan.item_images, item // n_groups % n_rows * plan.item_rows
    col0 = item // n_groups // n_rows * k.columns.outputs * 8
    rows, x0 = min(plan.item_rows, shape.h - row0), max(0, row0 - k.p)
    x_rows, images = min(shape.h, row0 + rows + k.p) - x0, min(plan.item_images, shape.n - n0)
    groups, xs = math.ceil(images / k.ni), k.zero
    ys = xs + plan.x_stride * plan.item_images
    memory = np.full((ys + plan.y_stride * plan.item_images + 128) // 2, np.nan)
    memory[: k.zero // 2] = 0
    empty = np.zeros((groups * k.ni - images, shape.h, shape.w))  # Loader::clear
    load = functools.partial(load_rows, memory)
    image_x, image_y = np.concatenate([x[n0 : n0 + images], empty]), np.concatenate([dy[n0 : n0 + images], empty])
    load(xs, image_x, x0, x_rows, col0 - 8 * k.columns.offset, plan.x_stride, k.x_pitch, k.columns.inputs)
    load(ys, image_y, row0, rows, col0, plan.y_stride, k.y_pitch, k.columns.outputs)
    sets, slices = math.ceil(rows / k.set_rows) * k.set_tasks, len(acc) // k.wg
    for warp in range(len(acc)):
        pair = warp % k.wg * k.r
        for number in range(warp // k.wg, sets * groups, slices):
            group, at = divmod(number, sets)
            h = at // k.set_tasks * k.set_rows + at % k.set_tasks
            top = row0 + h + 2 * pair - k.p
            q_lo = 0 if top + k.gr >= 0 else (-top - k.gr + 1) // 2
            q_hi = (shape.h - 1 - top) >> 1
            x_row = top - x0 + k.kx // k.ni + ((LANE >> 3) & 1)
            xg, yg = (
                xs + (group * k.ni + k.kx % k.ni) * plan.x_stride,
                ys + (group * k.ni + k.ky % k.ni) * plan.y_stride,
            )
            x_lines = StageRows(xg, x_row, x_rows, 0, k.x_pitch)
            k.accumulate(memory, acc[warp], x_lines, yg, h + k.ky // k.ni, rows, 0, q_lo, q_hi)


# ---- channels_last.cu
# Planes of x and of the weight (or of dy) of every product; test_planes holds them to the header.
TERMS = {1: [(0, 0)], 2: [(1, 0), (0, 1), (0, 0)], 3: [(2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0)]}


def movmatrix(v):
    """The 8x8 matrix of whose row g thread (g, q) holds columns 2 q and 2 q + 1, transposed: [32, 2] to [32, 2]."""
    m = np.empty((8, 8))
    m[G[:, None], 2 * Q[:, None] + _p] = v
    return m.T[G[:, None], 2 * Q[:, None] + _p]


def peel(v):
    """The next bfloat16 plane of float32 values, and what is left of them."""
    bits = v.astype(np.float32).view(np.uint32)
    plane = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return plane.astype(float), (v.astype(np.float32) - plane).astype(float)


@dataclass(frozen=True)
class RingLayout:
    """Where things lie in the ring, in bytes; channels of a group from `channels` on have no plane."""

    base: int
    channels: int
    stride: int
    plane: int
    group: int
    set: int


class Units:
    """struct Units. `x` and `y` are flat arrays of elements; `size` is that of an element in bytes.

    At most `rows` rows are moved at once, by `warps` warps, each with about `depth` units under way.
    """

    def __init__(self, size, planes, blocks, pitch, images, groups, width, rows, warps, depth=8):
        self.size, self.planes, self.blocks, self.pitch, self.ni, self.groups = (
            size, planes, blocks, pitch, images, groups,
        )  # fmt: skip
        self.per, self.line = width // size, blocks * groups
        self.lines, self.chunks = 1 if self.line > 2 else 4 // self.line, math.ceil(self.line / 4)
        step = self.lines * warps
        most = min(math.ceil(rows * images / step), depth // ((2 if size == 4 else 1) * self.chunks))
        assert step % images == 0 or images % step == 0
        a_row = max(1, images // step)
        self.warps, self.batch, self.pixels = warps, max(1, most // a_row) * a_row, 32 // groups

    def _lane(self, unit):
        line = unit // self.line if self.lines > 1 else unit * 0
        return line, (unit % self.line if self.lines > 1 else unit) // self.groups, unit % self.groups

    def _inside(self, block, chunk):
        return np.full(32, True) if self.lines > 1 else block + chunk * (4 // self.groups) < self.blocks

    def _word(self, ring, block, group):
        return ring.base + group * ring.group + ((LANE >> 2) & 1) * ring.plane + block * 16 + (LANE & 3) * 4

    def _read_pixel(self, x, at, limit):
        v = np.zeros((32, 8))
        for i in range(8 // self.per):
            ok = i * self.per < limit
            assert ((i + 1) * self.per <= limit)[ok].all(), "a read past the last channel"
            assert (at[ok] % self.per == 0).all(), "a read that is not aligned"
            v[ok, i * self.per : (i + 1) * self.per] = x[at[ok, None] + i * self.per + np.arange(self.per)]
        return v

    def load(self, ring, slot_row, x, start, images, rows, left, height, width, channels, limit, warp):
        """(addresses, words, mask) of every store of a warp to shared memory."""
        (from_line, block, group), to = self._lane(LANE & 3), self._lane(LANE >> 3)
        lines, col, mine, b = rows * self.ni, left + block * 8 + (LANE >> 2), limit - group * 8, (LANE >> 2) & 1
        target = self._word(ring, *to[1:]) + slot_row * self.pitch
        start = start + col * channels + group * 8
        for l0 in range(warp * self.lines, lines, self.warps * self.lines * self.batch):
            for k in range(self.batch):
                step = l0 + k * self.warps * self.lines
                line, to_line = step + from_line, step + to[0]
                ok = (line < lines) & (line % self.ni < images)
                at = start + line % self.ni * height * width * channels + line // self.ni * width * channels
                for c in range(self.chunks):
                    column = col + c * self.pixels
                    there = ok & self._inside(block, c) & (column >= 0) & (column < width)
                    v = self._read_pixel(x, at + c * self.pixels * channels, np.where(there, mine, 0))
                    to_at = target + to_line % self.ni * ring.stride + to_line // self.ni * self.pitch
                    written = (to_line < lines) & self._inside(to[1], c)
                    for p in range(self.planes):
                        plane, v = peel(v) if self.size == 4 else (v, v)
                        for i in range(4):
                            words = movmatrix(plane[:, 2 * i : 2 * i + 2])
                            address = to_at + c * self.pixels * 2 + p * ring.set + 2 * i * ring.plane
                            yield address, words, written & (2 * i + b < ring.channels)

    def store(self, ring, slot_row, memory, images, rows, columns, height, width, channels, limit, warp):
        """What a warp does: ("read", shared addresses, mask) and ("write", elements from y on, values)."""
        (from_line, block, group), to = self._lane(LANE >> 3), self._lane(LANE & 3)
        lines, col, mine, b = rows * self.ni, to[1] * 8 + (LANE >> 2), limit - to[2] * 8, (LANE >> 2) & 1
        source, start = self._word(ring, block, group) + slot_row * self.pitch, col * channels + to[2] * 8
        for l0 in range(warp * self.lines, lines, self.warps * self.lines * self.batch):
            for k in range(self.batch):
                line = np.minimum(l0 + k * self.warps * self.lines + from_line, lines - 1)
                to_line = l0 + k * self.warps * self.lines + to[0]
                at = source + line % self.ni * ring.stride + line // self.ni * self.pitch
                ok = (to_line < lines) & (to_line % self.ni < images)
                to_at = start + to_line % self.ni * height * width * channels + to_line // self.ni * width * channels
                for c in range(self.chunks):
                    out = np.empty((32, 8))
                    for i in range(4):
                        there = self._inside(block, c) & (2 * i + b < ring.channels)
                        word = at + c * self.pixels * 2 + 2 * i * ring.plane
                        yield "read", word, there
                        upper = movmatrix(np.where(there[:, None], load_words(memory, np.where(there, word, 0)), 0))
                        if self.size == 4:
                            low = load_words(memory, np.where(there, word + ring.set, 0))
                            upper = join_halves(upper, movmatrix(np.where(there[:, None], low, 0)))
                        out[:, 2 * i : 2 * i + 2] = upper
                    write = ok & self._inside(to[1], c) & (col + c * self.pixels < columns)
                    for i in range(8 // self.per):
                        part = np.arange(i * self.per, (i + 1) * self.per)
                        w = write & (i * self.per < mine)
                        assert ((i + 1) * self.per <= mine)[w].all(), "a store past the last channel"
                        yield "write", (to_at + c * self.pixels * channels)[w, None] + part, out[w][:, part]


class SharedUnits:
    """struct SharedUnits: `groups` groups of `channels`, those of all blocks of a cluster, `window` bytes apart."""

    def __init__(self, size, planes, blocks, pitch, images, groups, channels, width, warps, cluster, window):
        self.size, self.planes, self.blocks, self.pitch, self.ni = size, planes, blocks, pitch, images
        self.groups, self.channels, self.per, self.warps = groups, channels, width // size, warps
        self.mine, self.window = groups * channels // cluster, window

    def _units(self, warp, rows):
        """Of every access of a warp: whether lanes have a unit, its group, column block, image and row."""
        units = max(0, rows) * self.ni * self.blocks * self.groups
        for first in range(warp * 32, units, 32 * self.warps):
            unit, group = first + LANE, LANE % self.groups
            line, block = unit // self.groups // self.blocks, unit // self.groups % self.blocks
            yield unit < units, group, block, line % self.ni, line // self.ni

    def _planes(self, ring, group, block, image, row):
        """Shared addresses of a unit, one for each of its channels."""
        place = ring.base + image * ring.stride + row * self.pitch + block * 16
        for c in range(self.channels):
            owner, own = np.divmod(group * self.channels + c, self.mine)
            yield place + own // 8 * ring.group + own % 8 * ring.plane + owner * self.window

    def _parts(self, limit):
        for i in range(0, self.channels, self.per):
            ok = i < limit
            assert (i + self.per <= limit)[ok].all(), "past the last channel"
            yield ok, i + np.arange(self.per)

    def load(self, ring, slot_row, x, start, images, rows, left, height, width, channels, limit, warp):
        """(addresses, values [32, 8], mask) of every store of a warp to shared memory, its own or another block's."""
        for there, group, block, image, row in self._units(warp, rows):
            first = group * self.channels
            mine, pixels = np.where(there & (image < images), limit - first, 0), np.zeros((32, self.channels, 8))
            for p in range(8):
                col = left + block * 8 + p
                at = start + first + ((image * height + row) * width + col) * channels
                for ok, part in self._parts(np.where((col >= 0) & (col < width), mine, 0)):
                    assert ((at + part[0])[ok] % self.per == 0).all(), "a read that is not aligned"
                    pixels[ok, part[0] : part[-1] + 1, p] = x[at[ok, None] + part]
            for p in range(self.planes):
                plane, pixels = peel(pixels) if self.size == 4 else (pixels, pixels)
                for c, address in enumerate(self._planes(ring, group, block, image, slot_row + row)):
                    yield address + p * ring.set, plane[:, c], there

    def store(self, ring, slot_row, memory, images, rows, columns, height, width, channels, limit, warp):
        """As Units.store."""
        for there, group, block, image, row in self._units(warp, rows):
            there = there & (image < images)
            pixels = np.zeros((32, 8, 8))
            for c, address in enumerate(self._planes(ring, group, block, image, slot_row + row)):
                yield "read", address, there
                pixels[there, :, c] = memory[address[there, None] // 2 + np.arange(8)]
            first = group * self.channels
            for p in range(8):
                col = block * 8 + p
                at = first + ((image * height + row) * width + col) * channels
                for ok, part in self._parts(np.where(there & (col < columns), limit - first, 0)):
                    yield "write", at[ok, None] + part, pixels[ok, p][:, part]


def split_halves(v):
    """The upper and the lower 16 bits of float32 values, as numbers."""
    bits = v.astype(np.float32).view(np.uint32)
    return (bits >> 16).astype(float), (bits & 0xFFFF).astype(float)


def join_halves(upper, lower):
    # Of lanes that write nothing NaN may come here.
    upper, lower = (np.nan_to_num(half).astype(np.uint32) for half in (upper, lower))
    return (upper << 16 | lower).view(np.float32).astype(float)


class NhwcBlock:
    """Shared memory of a block; NaN wherever nothing was written and where what was written is done with."""

    barriers = 512

    def __init__(self, shape, plan, zero, cluster=1):
        self.shape, self.size, self.window = shape, 4 if shape.dtype == torch.float32 else 2, plan.launch.shared_bytes
        self.memory = np.full(cluster * self.window // 2, np.nan)
        for block in range(cluster):
            at = block * self.window + self.barriers
            self.memory[at // 2 : (at + zero) // 2] = 0
        self.done = Counter()

    def put(self, stores):
        for address, words, ok in stores:
            self.memory[address[ok, None] // 2 + np.arange(words.shape[1])] = words[ok]

    def offset(self, item, h):
        """Of a row of the item's first image, in elements."""
        return (item.n0 * self.shape.h + h) * self.shape.w * self.shape.c + item.c0

    def forget(self, key, warps, layout, groups, planes, images, first, count, pitch):
        """NaN over a slot once all warps are done with it."""
        self.done[key] += 1
        if self.done[key] == warps:
            for p, g, k, i in itertools.product(range(planes), range(groups), range(layout.channels), range(images)):
                at = layout.base + p * layout.set + g * layout.group + k * layout.plane + i * layout.stride
                self.memory[(at + first * pitch) // 2 : (at + (first + count) * pitch) // 2] = np.nan


class ForwardNhwc(NhwcBlock):
    """What the warps of forward_nhwc do between their barriers, in one cluster.

    Warps and channels are numbered through the blocks of the cluster, whose shared memory lies in one array.
    """

    def __init__(self, k, x, weight, bias, plan, shape, tile, width, y, writes):
        self.barriers = round_up(plan.slots * ((32 if tile.stores_together else 24) + 8 * plan.channels), 128)
        super().__init__(shape, plan, k.zero, tile.cluster)
        self.k, self.plan, self.tile, self.x, self.weight, self.bias, self.y, self.writes = (
            k, plan, tile, x.reshape(-1), weight, bias, y.reshape(-1), writes.reshape(-1),
        )  # fmt: skip
        self.table_bytes, self.tables = round_up(shape.planes * 2 * k.table.copy, 128), self.barriers + k.zero
        ring, base = plan.ring, self.tables + plan.channels * self.table_bytes
        self.layout = RingLayout(base, min(8, plan.channels), ring.stride, ring.plane, ring.group, ring.set)
        self.rows = k.ts * k.mt
        self.into, self.back = (
            SharedUnits(
                self.size, shape.planes, blocks, k.pitch, k.ni, tile.groups * tile.cluster, 8, width,
                warps * tile.cluster, tile.cluster, self.window,
            )
            if together
            else Units(self.size, shape.planes, blocks, k.pitch, k.ni, tile.groups, width, self.rows, warps)
            for blocks, warps, together in (
                (k.columns.inputs, tile.loaders, tile.cluster > 1),
                (k.columns.outputs, tile.storers, tile.stores_together),
            )
        )  # fmt: skip
        self.built, self.results = {}, {}

    def limits(self, item):
        return max(0, item.row0 - self.k.p), min(self.shape.h, item.row1 + self.k.p + 1)

    def load(self, item, j, slot, warp):
        s, (lo, hi), top = self.shape, self.limits(item), item.row0 + (j - self.plan.halo) * self.rows
        h0 = max(lo, top)
        self.put(
            self.into.load(
                self.layout, slot * self.rows + h0 - top, self.x, self.offset(item, h0), s.n - item.n0,
                min(hi, top + self.rows) - h0, item.col0 - 8 * self.k.columns.offset, s.h, s.w, s.c,
                min(s.c - item.c0, self.plan.channels * self.tile.cluster), warp,
            )
        )  # fmt: skip

    def convolve(self, item, j, slot, channel):
        if (c := item.c0 + channel) < self.shape.c:
            block, own = divmod(channel, self.plan.channels)
            table, zero = (
                block * self.window + self.tables + own * self.table_bytes,
                block * self.window + self.barriers,
            )
            if self.built.get(channel) != c:
                self.built[channel] = c
                self.build(table, self.weight[c])
            acc = self.products(item, j, slot, self.plane(channel), table + self.k.table.lane_offset(), zero)
            self.results[item, j, channel] = acc + self.bias[c]

    def finish(self, item, j, slot, channel):
        if item.c0 + channel < self.shape.c:
            self.put_results(self.results.pop((item, j, channel)), slot, self.plane(channel))

    def plane(self, channel):
        block, own = divmod(channel, self.plan.channels)
        return block * self.window + self.layout.base + own // 8 * self.layout.group + own % 8 * self.layout.plane

    def build(self, table, weight):
        if self.size == 2:
            return self.k.table.build(self.memory, table, weight, False, 32)
        for p in range(self.shape.planes):
            plane, weight = peel(weight)
            self.k.table.build(self.memory, table + p * 2 * self.k.table.copy, plane, False, 32)

    def products(self, item, j, slot, plane, table, zero):
        k, (lo, hi), h0 = self.k, self.limits(item), item.row0 + j * self.rows
        tiles = min(k.mt, math.ceil((item.row1 - h0) / k.ts))
        e0 = max(0, k.p - h0 - k.gr) & ~1
        e1 = min(k.khp + k.ts * (tiles - 1), self.shape.h - h0 + k.p)
        acc, row = np.zeros((k.mt, k.columns.outputs, 4, 32)), k.off + e0 - k.p
        for x, w in TERMS[self.shape.planes]:
            rows = RingRows(
                plane + x * self.layout.set + k.img * self.layout.stride, (slot + self.plan.halo) * self.rows + row,
                self.plan.slots * self.rows, h0 + row - lo, min(hi, h0 + self.rows + k.p + 1) - lo, zero,
                k.pitch,
            )  # fmt: skip
            run = k.accumulate if k.window or k.mt <= 2 else k.accumulate_apart
            run(self.memory, acc, rows, table + w * 2 * k.table.copy, e0, e1, tiles)
        return acc

    def put_results(self, acc, slot, plane):
        k = self.k
        for t, b, half in itertools.product(range(k.mt), range(k.columns.outputs), range(2)):
            m = G + 8 * half
            to = plane + m % k.ni * self.layout.stride + (slot * self.rows + m // k.ni + k.ts * t) * k.pitch
            to, v = (to + b * 16 + Q * 4)[:, None] // 2 + _p, acc[t, b, 2 * half : 2 * half + 2].T
            if self.size == 4:
                self.memory[to], self.memory[to + self.layout.set // 2] = split_halves(v)
            else:
                self.memory[to] = v

    def store(self, item, j, slot, warp):
        s, h0, storers = self.shape, item.row0 + j * self.rows, self.tile.storers
        # A block's own channels, or those of all.
        block, first, limit = warp // storers, warp // storers * self.plan.channels, self.plan.channels
        if self.tile.stores_together:
            block, first, limit, storers = 0, 0, limit * self.tile.cluster, storers * self.tile.cluster
        layout = replace(self.layout, base=self.layout.base + block * self.window)
        start = self.offset(item, h0) + item.col0 * s.c + first
        for kind, at, values in self.back.store(
            layout, slot * self.rows, self.memory, s.n - item.n0, min(self.rows, item.row1 - h0),
            s.w - item.col0, s.h, s.w, s.c, min(s.c - item.c0 - first, limit), warp % storers,
        ):  # fmt: skip
            if kind == "write":
                self.y[start + at] = values
                np.add.at(self.writes, start + at, 1)
        for window in range(self.tile.cluster) if self.tile.stores_together else (0,):
            self.forget(
                (block, window, item, j), storers, replace(layout, base=layout.base + window * self.window),
                self.tile.groups, s.planes, self.k.ni, slot * self.rows, self.rows, self.k.pitch,
            )  # fmt: skip


class WeightGradNhwc(NhwcBlock):
    """What the warps of weight_grad_nhwc do between their barriers, in one cluster and group of kernel rows.

    Warps are numbered through the blocks of the cluster, whose shared memory lies in one array.
    """

    def __init__(self, k, x, dy, plan, shape, tile, width, row_group, partial):
        super().__init__(shape, plan, k.zero, tile.cluster)
        self.k, self.plan, self.tile, self.x, self.dy = k, plan, tile, x.reshape(-1), dy.reshape(-1)
        self.channels, self.row_group, self.partial = 8 // tile.warps, row_group, partial
        rings, base = (plan.x_ring, plan.y_ring), self.barriers + k.zero
        self.xs, self.ys = (
            RingLayout(at, self.channels, ring.stride, ring.plane, 0, ring.set)
            for ring, at in zip(rings, (base, base + shape.planes * plan.x_ring.set), strict=True)
        )
        self.x_units, self.y_units = (
            Units(self.size, shape.planes, n, pitch, k.ni, 1, width, tile.rows, tile.loaders)
            if tile.cluster == 1
            else SharedUnits(
                self.size, shape.planes, n, pitch, k.ni, 1, self.channels * tile.cluster, width,
                tile.loaders * tile.cluster, tile.cluster, self.window,
            )
            for n, pitch in ((k.columns.inputs, k.x_pitch), (k.columns.outputs, k.y_pitch))
        )  # fmt: skip
        self.acc = np.zeros((8 * tile.cluster, k.r, k.nd, 4, 32))

    def limit(self, item):
        return min(self.shape.c - item.c0, self.channels * self.tile.cluster)

    def limits(self, item):
        return max(0, item.row0 - self.k.p), min(self.shape.h, item.row1 + self.k.p + 1)

    def pair(self, warp):
        return (self.row_group * self.tile.warps + warp % 8 // self.channels) * self.k.r

    def load_x(self, item, j, slot, warp):
        (lo, hi), top, s = self.limits(item), item.row0 + (j - self.plan.halo) * self.tile.rows, self.shape
        h0 = max(lo, top)
        self.put(
            self.x_units.load(
                self.xs, slot * self.tile.rows + h0 - top, self.x, self.offset(item, h0), s.n - item.n0,
                min(hi, top + self.tile.rows) - h0, item.col0 - 8 * self.k.columns.offset, s.h, s.w, s.c,
                self.limit(item), warp,
            )
        )  # fmt: skip

    def load_y(self, item, j, slot, warp):
        h, s = item.row0 + j * self.tile.rows, self.shape
        self.put(
            self.y_units.load(
                self.ys, slot * self.tile.rows, self.dy, self.offset(item, h), s.n - item.n0,
                min(item.row1 - h, self.tile.rows), item.col0, s.h, s.w, s.c, self.limit(item), warp,
            )
        )  # fmt: skip

    def accumulate(self, item, j, x_slot, y_slot, warp):
        k, t, pair, (lo, hi) = self.k, self.tile, self.pair(warp), self.limits(item)
        h0 = item.row0 + j * t.rows
        rows, block, channel = min(item.row1 - h0, t.rows), warp // 8, warp % self.channels
        start, zero = block * self.window, block * self.window + self.barriers
        x_plane = start + self.xs.base + channel * self.xs.plane + k.kx % k.ni * self.xs.stride
        y_plane = start + self.ys.base + channel * self.ys.plane + k.ky % k.ni * self.ys.stride
        for task in range(math.ceil(rows / k.set_rows) * k.set_tasks if 2 * pair < k.kh else 0):
            h = task // k.set_tasks * k.set_rows + task % k.set_tasks
            top = h0 + h + 2 * pair - k.p
            q_lo, q_hi = 0 if top + k.gr >= 0 else (-top - k.gr + 1) // 2, (hi - 1 - top) >> 1
            row = h + 2 * pair - k.p + k.kx // k.ni + ((LANE >> 3) & 1)
            for x, w in TERMS[self.shape.planes]:
                lines = RingRows(
                    x_plane + x * self.xs.set, (x_slot + self.plan.halo) * t.rows + row, self.plan.x_slots * t.rows,
                    h0 + row - lo, hi - lo, zero, k.x_pitch,
                )  # fmt: skip
                ys = y_plane + w * self.ys.set + y_slot * t.rows * k.y_pitch
                k.accumulate(self.memory, self.acc[warp], lines, ys, h + k.ky // k.ni, rows, zero, q_lo, q_hi)
        planes, ni = self.shape.planes, k.ni
        for key, layout, slot, pitch in (("y", self.ys, y_slot, k.y_pitch), ("x", self.xs, x_slot, k.x_pitch)):
            layout = replace(layout, base=layout.base + start)
            self.forget((key, block, item, j), 8, layout, 1, planes, ni, slot * t.rows, t.rows, pitch)

    def flush(self, part, warp):
        """A warp's sums of the part's channels to the part's place in the partial sums [splits, C, KH, KW]."""
        k, start, base = self.k, warp // 8 * self.window, self.barriers + self.k.zero
        # The warps' corners lie in the rings.
        self.memory[(start + base) // 2 : (start + self.window) // 2] = np.nan
        c, pair = part.items[0].c0 + warp // 8 * self.channels + warp % self.channels, self.pair(warp)
        for r in range(k.r):
            ky = 2 * (pair + r)
            if c < self.shape.c and ky < k.kh:
                self.partial[part.split, c, ky : ky + 2] = k.reduce(self.acc[warp, r])[: k.kh - ky]
                if part.ends:
                    self.partial[part.split + 1 :, c, ky : ky + 2] = 0
        self.acc[warp] = 0


# ---- Loader of common.cuh
def loader_writes(images, n_rows, left, stride, pitch, blocks, producers, vector, asynchronous):
    """(address, image, row, first column, elements) of everything that the loader writes."""
    block = 16 if asynchronous or blocks > 1 else 8
    step = vector // 2 if asynchronous else 2
    per_row, many = blocks * 8 // step, images >= producers
    for warp in range(producers):
        for row in range((0 if many else warp) * block, n_rows, (1 if many else producers) * block):
            for image in range(warp if many else 0, images, producers if many else 1):
                for e in range(math.ceil(block * per_row / 32) * 32):
                    r, col = e // per_row, e % per_row * step
                    if r < min(block, n_rows - row):
                        at = row * pitch + image * stride + r * pitch + col * 2
                        yield at, image, row + r, left + col, step
