"""The kernels of ops/cuda in NumPy, with float64 in the place of 16-bit elements.

What the tensor-core instructions do is written after the PTX ISA (sections "Matrix fragments for mma.m16n8k16" and
"ldmatrix"); what the kernels do around them is transcribed from the .cu files, lane by lane. Shared memory is an array
with one value for two bytes, and holds NaN wherever nothing was written.
"""

import functools
import math
import random

import numpy as np

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
        for e in (e for tid in range(threads) for e in range(tid, self.kq * self.nu * 4, threads)):
            u, rest = (e >> 1) % self.nu, (e >> 1) // self.nu
            ky, kx = 2 * (rest % self.kq) + (e & 1), 2 * u - self.offset + rest // self.kq
            at = (self.kh - 1 - ky) * self.kw + self.kw - 1 - kx if flip else ky * self.kw + kx
            row = ky < self.kh
            lo = taps[at] if row and 0 <= kx < self.kw else 0.0
            hi = taps[at + (-1 if flip else 1)] if row and 0 <= kx + 1 < self.kw else 0.0
            to = table + rest // self.kq * self.copy + (rest % self.kq * self.nu + u) * 8 + (e & 1) * 4
            assert to not in written
            written.add(to)
            memory[to // 2 : to // 2 + 2] = lo, hi

    def lane_offset(self):
        t = 8 * self.low + 2 * Q - G + self.p + self.offset
        assert t.min() >= 0
        return (t & 1) * self.copy + (t >> 1) * 8


class Forward:
    """struct Forward; addresses are vectors over the lanes, the row of zeros lies at 0."""

    def __init__(self, kh, kw, columns, ni, mt):
        self.kh, self.columns, self.ni, self.mt = kh, columns, ni, mt
        self.low, self.high = band_limits(kw, columns)
        self.nd, self.p, self.khp, self.gr = self.high - self.low + 1, kh // 2, (kh + 1) & ~1, 16 // ni
        self.ts = max(2, self.gr)
        self.set_rows, self.set_tasks = (2 * mt, 2) if self.gr == 1 else (self.gr * mt, 1)
        self.pitch = (columns.inputs | 1 if ni < 8 else columns.inputs) * 16
        self.zero = round_up(columns.inputs * 16, 128)
        self.table = Table(kh, kw, self.low, self.high)
        self.table_bytes = round_up(2 * self.table.copy, 128)
        self.img, self.off = (LANE & 15) % ni, (LANE & 15) // ni + (LANE >> 4)

    def fragments(self, memory, table, e):
        b = np.zeros((self.nd, 2, 32, 2))
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

    def rows(self, memory, xs, x_row, x_rows):
        return np.where((x_row >= 0) & (x_row < x_rows), xs + x_row * self.pitch, 0)

    def accumulate(self, memory, acc, xs, x_row, x_rows, table, e, e_end):
        row = self.rows(memory, xs, x_row, x_rows)
        a = ldmatrix(memory, row)
        b = [self.fragments(memory, table, e - self.ts * t) for t in range(self.mt)]
        while True:
            x_row = x_row + 2
            following = self.rows(memory, xs, x_row, x_rows)
            active = range(self.mt)
            if self.mt == 2:
                active = (0,) if e < self.ts else (1,) if e >= self.khp else (0, 1)
            for c in range(self.columns.inputs):
                ahead = ldmatrix(memory, row + (c + 1) * 16 if c + 1 < self.columns.inputs else following)
                for t in active:
                    self.products(acc[t], c, a, b[t])
                a = ahead
            row, e = following, e + 2
            if e >= e_end:
                return
            if self.ts == 2:
                b = [self.fragments(memory, table, e), *b[:-1]]
            else:
                b = [self.fragments(memory, table, e - self.ts * t) for t in range(self.mt)]

    def accumulate_apart(self, memory, acc, xs, x_row, x_rows, table, e, e_end):
        for step in range(e, e_end, 2):
            row = self.rows(memory, xs, x_row + step - e, x_rows)
            for t in range(self.mt):
                if 0 <= step - self.ts * t < self.khp:
                    b = self.fragments(memory, table, step - self.ts * t)
                    for c in range(self.columns.inputs):
                        self.products(acc[t], c, ldmatrix(memory, row + c * 16), b)


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


class Result:
    """y in global memory: every element is written once."""

    def __init__(self, shape):
        self.y: np.ndarray = np.full(shape, np.nan)
        self.writes: np.ndarray = np.zeros(shape, int)

    def write(self, n, c, h, w, values):
        assert w + len(values) <= self.y.shape[3], "a store past the end of a row"
        self.y[n, c, h, w : w + len(values)] = values
        self.writes[n, c, h, w : w + len(values)] += 1


def exchange(a, b):
    """Pairs [32, 2] of two column blocks to four columns [32, 4] of one."""
    low, odd_lane = (Q < 2)[:, None], (Q & 1 == 1)[:, None]
    keep, got = np.where(low, a, b), np.where(low, b, a)[LANE ^ 2]
    even, odd = np.where(low, keep, got), np.where(low, got, keep)
    got = np.where(odd_lane, even, odd)[LANE ^ 1]
    return np.where(np.tile(odd_lane, 4), np.hstack([got, odd]), np.hstack([even, got]))


def store_half(k, out, acc, half, item, store, h0, group):
    n_images, _, _, width = out.y.shape
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


def forward_tasks(k, memory, out, item, shape, xs, table, stride, item_images, store, warps, rng):
    """Warps of a block take tasks from the item's counter, in an order of chance."""
    sets = math.ceil(item["rows"] / k.set_rows) * k.set_tasks
    groups = math.ceil(min(item_images, shape.n - item["n0"]) / k.ni)
    counter, states = 0, [[0, 0, 0] for _ in range(warps)]  # group, set, taken
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
        k.accumulate(memory, acc, at, h0 + k.off + e0 - k.p - item["x0"], item["x_rows"], table, e0, e1)
        for half in range(2):
            store_half(k, out, acc, half, item, store, h0, state[0])


def forward_nchw(x, weight, plan, shape, tile, *, flip=False):
    columns, rng = columns_of(shape.w, shape.kw), random.Random(0)
    k, out = Forward(shape.kh, shape.kw, columns, tile.images, tile.tiles), Result(x.shape)
    assert plan.launch.shared_bytes == _plan.HEAD + k.zero + tile.stages * (
        k.table_bytes + plan.stride * plan.item_images
    )
    store = int(plan.launch.expression.split(", ")[10])
    per_channel = columns.tiles * math.ceil(shape.h / plan.item_rows) * math.ceil(shape.n / plan.item_images)
    items, blocks = per_channel * shape.c, plan.launch.grid[0]
    for block in range(blocks):
        memory = np.full(plan.launch.shared_bytes // 2, np.nan)
        memory[: k.zero // 2] = 0
        first = items * block // blocks
        for count, number in enumerate(range(first, items * (block + 1) // blocks)):
            s, item = count % tile.stages, decode(number, k, plan, shape)
            table = k.zero + s * k.table_bytes
            xs = k.zero + tile.stages * k.table_bytes + s * plan.stride * plan.item_images
            memory[xs // 2 : (xs + plan.stride * plan.item_images) // 2] = np.nan
            images = x[item["n0"] : item["n0"] + plan.item_images, item["c"]]
            left = item["col0"] - 8 * columns.offset
            load_rows(memory, xs, images, item["x0"], item["x_rows"], left, plan.stride, k.pitch, columns.inputs)
            if count < tile.stages or (number - tile.stages) // per_channel != item["c"]:
                k.table.build(memory, table, weight[item["c"]], flip, tile.producers * 32)
            at = table + k.table.lane_offset()
            forward_tasks(
                k, memory, out, item, shape, xs, at, plan.stride, plan.item_images, store, min(tile.warps, 3), rng
            )
    assert (out.writes == 1).all()
    return out.y


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

    def accumulate(self, memory, acc, xs, x_row, x_rows, ys, y_row, y_rows, q_lo, q_hi):
        dy = np.empty((self.hb, self.jp, 4, 32, 2))
        for b in range(self.hb):
            r = y_row + 2 * b
            at = np.where((r >= 0) & (r < y_rows), ys + r * self.y_pitch, 0) + (LANE >> 4) * 16
            for j in range(self.jp):
                dy[b, j] = ldmatrix(memory, at + j * 32, transposed=True)
        every = q_lo <= 0 and q_hi >= self.r + self.hb - 2
        for q in range(self.r + self.hb - 1):
            if every or q_lo <= q <= q_hi:
                r = x_row + 2 * q
                self.multiply(memory, acc, np.where((r >= 0) & (r < x_rows), xs + r * self.x_pitch, 0), dy, q)

    def multiply(self, memory, acc, at, dy, q):
        for c in range(self.columns.inputs):
            a = ldmatrix(memory, at + c * 16, transposed=True)
            for b in (b for b in range(self.hb) if 0 <= q - b < self.r):
                for j in range(self.columns.outputs):
                    d = c - self.columns.offset - j - self.low
                    if 0 <= d < self.nd:
                        mma(acc[q - b, d], a, dy[b, j // 2, (j & 1) * 2 : (j & 1) * 2 + 2])

    def reduce(self, acc, half):
        """Sums of the diagonals: one row of taps."""
        buffer = np.full(self.nd * 64, np.nan)
        at = (LANE >> 2) * 8 + 2 * (LANE & 3)
        for d in range(self.nd):
            for p in range(2):
                buffer[d * 64 + at + p] = acc[d, 2 * half + p]
        row = np.zeros(self.kw)
        for kx in range(self.kw):
            for d in range(self.nd):
                diagonal = kx - self.kw // 2 - 8 * (d + self.low)
                row[kx] += sum(
                    buffer[d * 64 + m * 8 + m - diagonal] for m in range(max(0, diagonal), min(8, 8 + diagonal))
                )
        return row


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
                    for half in range(2):
                        row = ((warp % k.wg) * k.r + r) * 2 + half
                        taps[warp // k.wg, row] = k.reduce(acc[warp, r], half)
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
            k.accumulate(memory, acc[warp], xg, x_row, x_rows, yg, h + k.ky // k.ni, rows, q_lo, q_hi)


# ---- channels_last.cu
def plane_block(planes, b, blocks, pitch):
    return planes + b // blocks * pitch + b % blocks * 16


def to_planes(memory, planes, pixels, n_rows, plane, blocks, pitch):
    count = n_rows * blocks
    for b in range(0, count, 4):
        r = ldmatrix(
            memory, pixels + np.where(b * 8 + LANE < count * 8, b * 8 + LANE, 0) * 16, transposed=True
        )  # matrix i: 8 pixels x 8 channels
        for i in range(min(4, count - b)):
            to = plane_block(planes, b + i, blocks, pitch) + (LANE >> 2) * plane + (LANE & 3) * 4
            memory[to[:, None] // 2 + _p] = r[i]


def from_planes(memory, y, planes, n_rows, cols, plane, blocks, pitch):
    """y: [rows, columns, channels] from the item's first element on; returns how often each was written."""
    writes, count = np.zeros(y.shape, int), n_rows * blocks
    for b in range(0, count, 4):
        mine = b + (LANE >> 3)
        at = np.array([plane_block(planes, m if m < count else 0, blocks, pitch) for m in mine]) + (LANE & 7) * plane
        r = ldmatrix(memory, at, transposed=True)
        for i in range(4):
            row = (b + i) // blocks
            for lane in LANE:
                col, channel = (b + i) % blocks * 8 + (lane >> 2), 2 * (lane & 3)
                if row < n_rows and col < cols:
                    for p in (p for p in range(2) if channel + p < y.shape[2]):
                        y[row, col, channel + p] = r[i, lane, p]
                        writes[row, col, channel + p] += 1
    return writes


def forward_nhwc(x, weight, plan, shape, tile):
    """x: [N, H, W, C]; one block of up to 8 channels."""
    columns, (n_images, height, width, channels) = tile.columns, x.shape
    k, y, writes = Forward(shape.kh, shape.kw, columns, tile.images, tile.tiles), x * np.nan, np.zeros(x.shape, int)
    tables, planes = k.zero, k.zero + 8 * k.table_bytes
    pixels = planes + round_up(8 * plan.plane, 128)
    for n0 in range(0, n_images, plan.item_images):
        for row0 in range(0, height, plan.item_rows):
            for col0 in range(0, width, columns.outputs * 8):
                rows, x0 = min(plan.item_rows, height - row0), max(0, row0 - k.p)
                x_rows = min(height, row0 + rows + k.p) - x0
                images = x[n0 : n0 + plan.item_images]
                memory = np.full((plan.launch.shared_bytes - _plan.HEAD) // 2, np.nan)
                memory[: k.zero // 2] = 0
                padded = np.zeros((len(images), x_rows, columns.inputs * 8, 8))
                left = col0 - 8 * columns.offset
                lo, hi = max(0, left), min(width, left + columns.inputs * 8)
                padded[:, :, lo - left : hi - left, :channels] = images[:, x0 : x0 + x_rows, lo:hi]
                memory[pixels // 2 : pixels // 2 + padded.size] = padded.reshape(-1)
                for i in range(len(images)):
                    at = pixels + i * x_rows * columns.inputs * 128
                    to_planes(memory, planes + i * plan.stride, at, x_rows, plan.plane, columns.inputs, k.pitch)
                for warp in range(channels):
                    k.table.build(memory, tables + warp * k.table_bytes, weight[warp], False, 32)
                    nhwc_warp(k, memory, planes, tables, warp, plan, len(images), row0, rows, x0, x_rows, height)
                for i in range(len(images)):
                    part = np.s_[n0 + i, row0 : row0 + rows, col0:]
                    writes[part] += from_planes(
                        memory, y[part], planes + i * plan.stride, rows, width - col0, plan.plane, columns.outputs,
                        k.pitch,
                    )  # fmt: skip
    assert (writes == 1).all()
    return y


def nhwc_warp(k, memory, planes, tables, warp, plan, images, row0, rows, x0, x_rows, height):
    e0, e1 = max(0, k.p - row0 - k.gr) & ~1, min(k.khp + k.ts * (k.mt - 1), height - row0 + k.p)
    mine, table = planes + warp * plan.plane, tables + warp * k.table_bytes + k.table.lane_offset()
    for g in range(0, images, k.ni):
        acc = np.zeros((k.mt, k.columns.outputs, 4, 32))
        run = k.accumulate if k.ts == 2 else k.accumulate_apart
        run(memory, acc, mine + (g + k.img) * plan.stride, row0 + k.off + e0 - k.p - x0, x_rows, table, e0, e1)
        for t in range(k.mt):
            for half in range(2):
                m = G + 8 * half
                h = m // k.ni + k.ts * t
                for j in range(k.columns.outputs):
                    at = mine + (g + m % k.ni) * plan.stride + h * k.pitch + j * 16 + Q * 4
                    ok = h < rows
                    memory[at[ok, None] // 2 + _p] = acc[t, j, 2 * half : 2 * half + 2].T[ok]


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
