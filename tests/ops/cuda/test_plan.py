"""Plans for any shape and GPU: they fit, cover every output once, and agree with the kernels' own constants."""

import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from replknet.ops.cuda import _plan, _plan_channels_last
from replknet.ops.cuda._compile import source
from replknet.ops.cuda._launch import Gpu
from replknet.ops.cuda._plan import Columns, Shape

GPUS = (
    Gpu("sm_80", 108, 166912),
    Gpu("sm_86", 84, 101376),
    Gpu("sm_89", 128, 101376),
    Gpu("sm_90a", 132, 232448, clusters=True),
    Gpu("sm_100a", 148, 232448, clusters=True),
    Gpu("sm_120a", 170, 101376, clusters=True),
)
PLANS = {
    "forward": _plan.forward_plan,
    "weight_grad": _plan.weight_grad_plan,
    "forward, channels_last": _plan_channels_last.forward_plan,
    "weight_grad, channels_last": _plan_channels_last.weight_grad_plan,
}
TEMPLATES = {
    "forward_nchw": "dt np kh kw cbi cbo off ni mt v sv warps prod stages minb",
    "weight_grad_nchw": "dt np kh kw cbi cbo off ni r hb v warps prod stages minb",
    "forward_nhwc": "dt np kh kw cbi cbo off ni mt g v cluster warps loaders storers minb",
    "weight_grad_nhwc": "dt np kh kw cbi cbo off ni r hb wg sr v cluster loaders taken minb",
}
CONTIGUOUS = ("forward", "weight_grad")
CHANNELS_LAST = ("forward, channels_last", "weight_grad, channels_last")


def template(plan) -> dict[str, int]:
    """The template arguments of a plan by name; gradients in channels_last have 8 consumer warps; others produce."""
    name, arguments = plan.launch.expression.rstrip(">").split("<")
    values = dict(zip(TEMPLATES[name].split(), map(int, arguments.split(", ")), strict=True))
    return {"warps": 8, "prod": values.get("loaders", 0) + values.get("storers", 0)} | values


def align_of(n_bytes: int) -> int:
    return min(16, n_bytes & -n_bytes)


def shape_for(which: str, n, c, h, w, kh, kw, dtype, planes) -> Shape:
    """With the alignment of a freshly allocated tensor in the plan's memory format."""
    fastest = c if "channels_last" in which else w
    return Shape(n, c, h, w, kh, kw, dtype, planes, align_of(fastest * (4 if dtype == torch.float32 else 2)))


def size(largest: int):
    """Small numbers, those around a multiple of 8, and any."""
    near = st.builds(lambda a, b: min(largest, max(1, 8 * a + b)), st.integers(0, largest // 8), st.integers(-1, 1))
    return st.integers(1, min(4, largest)) | near | st.integers(1, largest)


ODD = st.integers(0, 31).map(lambda i: 2 * i + 1)
TYPES = st.sampled_from([(torch.float16, 1), (torch.bfloat16, 1), (torch.float32, 2), (torch.float32, 3)])


@st.composite
def problems(draw, which: tuple[str, ...]):
    """A plan that exists: (shape, GPU, plan)."""
    name, gpu = draw(st.sampled_from(which)), draw(st.sampled_from(GPUS))
    dtype, planes = draw(TYPES)
    shape = shape_for(name, draw(size(300)), draw(size(300)), draw(size(260)), draw(size(260)), draw(ODD), draw(ODD),
                      dtype, planes)  # fmt: skip
    try:
        return shape, gpu, PLANS[name](shape, gpu)
    except NotImplementedError:
        assume(False)
        raise


many = settings(max_examples=150, deadline=None, derandomize=True)


@many
@given(problems(tuple(PLANS)))
def test_every_launch_is_within_the_limits_of_the_gpu(problem):
    _, gpu, plan = problem
    t, launch = template(plan), plan.launch
    assert launch.block == (t["warps"] + t["prod"]) * 32 <= 1024
    assert min(launch.grid) >= 1
    assert max(launch.grid[1:]) <= 65535
    assert launch.shared_bytes <= gpu.shared_bytes
    # Every resident block costs 1 KiB more, of which gpu.shared_bytes has left out one.
    assert t["minb"] * (launch.shared_bytes + 1024) <= gpu.shared_bytes + 1024
    assert t["minb"] * launch.block <= 1536, "threads of a multiprocessor of sm_86, sm_89 and sm_120"


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.arch)
@pytest.mark.parametrize(
    "size", [(64, 128, 56, 56, 31, 31), (64, 96, 56, 56, 51, 5), (16, 256, 40, 40, 21, 21)], ids=str
)
def test_registers_are_taken_where_there_are_as_many(gpu, size):
    """A warp that takes more than the others leave waits for ever."""
    shape = shape_for("channels_last", *size, torch.float16, 1)
    plan = _plan_channels_last.weight_grad_plan(shape, gpu)
    t = template(plan)
    assert (t["taken"] > 0) == gpu.clusters
    if t["taken"]:
        launched = 65536 // plan.launch.block // 8 * 8
        left = 3 * launched - 2 * t["taken"]  # of a loader, as in the kernel
        assert launched == _plan_channels_last.LAUNCHED
        assert (t["loaders"], t["cluster"], t["minb"], left % 8) == (4, 2, 1, 0)
        assert 8 * t["taken"] + 4 * left <= plan.launch.block // 32 * launched
        assert gpu.arch.endswith("a"), "instructions of one architecture"


@many
@given(problems(CONTIGUOUS))
def test_barriers_and_counters_fit_the_head(problem):
    _, _, plan = problem
    t = template(plan)
    # The head holds two barriers a stage in 128 bytes and a counter a stage behind them.
    assert t["stages"] * 16 <= 128
    assert 128 + t["stages"] * 4 <= _plan.HEAD


@many
@given(problems(tuple(PLANS)))
def test_copies_are_as_wide_as_the_alignment_allows(problem):
    shape, _, plan = problem
    t = template(plan)
    v, size = t["v"], 4 if shape.dtype == torch.float32 else 2
    assert v in (2, 4, 8, 16)
    if "nhwc" in plan.launch.expression:
        # Whole elements, of channels of the block alone, or of the cluster's.
        channels = plan.channels if "mt" in t else 8 // t["wg"] * t["cluster"]
        assert v % size == 0
        assert v == size or (v <= shape.align and v <= channels * size)
        assert v == min(16, shape.align, channels * size) or v == size
    else:
        assert v == 2 or (shape.dtype != torch.float32 and v <= shape.align)


@many
@given(problems(("weight_grad, channels_last",)))
def test_two_blocks_share_pixels_whose_channels_are_one_access(problem):
    shape, gpu, plan = problem
    t, size = template(plan), 4 if shape.dtype == torch.float32 else 2
    channels, cluster = 8 // t["wg"], t["cluster"]
    assert cluster == 1 or (gpu.clusters and cluster == 2 and shape.c % (2 * channels) == 0)
    assert cluster == 1 or t["v"] == channels * cluster * size


@many
@given(problems(("forward",)))
def test_forward_buffers_fit_shared_memory(simulation, problem):
    shape, _, plan = problem
    t = template(plan)
    k = forward(simulation, t)
    table = _plan.round_up(t["np"] * 2 * k.table.copy, 128)
    stage = table + t["np"] * plan.stride * plan.item_images
    assert (
        _plan.HEAD + k.zero + t["stages"] * stage + t["warps"] * k.staging(t["dt"], t["v"]) == plan.launch.shared_bytes
    )
    assert plan.launch.block >= k.zero // 4, "a thread clears one word of the row of zeros"
    if k.staging(t["dt"], t["v"]):
        assert t["cbo"] == t["cbi"]
        assert t["off"] == 0, "a task has whole rows"
        # All rows of a task, behind the bytes that a span begins after a word.
        assert k.span >= k.set_rows * shape.w * 2 + 2
        assert k.span % 16 == 0
        assert k.ni < 8 or k.span // 16 % 2 == 1, "eight images, four words of each, meet in no bank"


@many
@given(problems(("weight_grad",)))
def test_weight_gradient_buffers_fit_shared_memory(simulation, problem):
    _, _, plan = problem
    t = template(plan)
    k = weight_grad(simulation, t)
    stage = t["np"] * (plan.x_stride + plan.y_stride) * plan.item_images
    taps = t["warps"] * t["r"] * 2 * t["kw"]
    reduction = (taps + taps % 2 + t["warps"] * k.nd * 64) * 4
    # dy's fragments are loaded two column blocks at a time: the last may reach 16 bytes past the stage.
    assert _plan.HEAD + k.zero + max(t["stages"] * stage + 16, reduction) <= plan.launch.shared_bytes
    assert t["warps"] % k.wg == 0


def check_ring(ring, pitch: int, ni: int, channels: int, groups: int, lines: int):
    """Images, planes, groups and sets of a ring of so many rows do not overlap, and lie in banks of their own."""
    assert ring.stride >= lines * pitch
    assert ring.plane >= (ni - 1) * ring.stride + lines * pitch
    assert ring.set >= (groups - 1) * ring.group + (channels - 1) * ring.plane + (ni - 1) * ring.stride + lines * pitch
    assert ring.stride % 16 == ring.group % 16 == ring.set % 128 == 0
    assert ring.plane % 128 == 64, "two planes, of 64 bytes each, are written at once"
    if groups == 2:
        assert ring.group >= channels * ring.plane
        assert ring.group % 64 == 32, "and two groups of 32 bytes"


@many
@given(problems(CHANNELS_LAST[:1]))
def test_the_forward_ring_fits_shared_memory(simulation, problem):
    shape, _, plan = problem
    t = template(plan)
    k, channels, lines = forward(simulation, t), min(8, plan.channels), plan.slots * k_rows(simulation, t)
    assert plan.channels == 16 if t["g"] == 2 else 1 <= plan.channels <= 8
    check_ring(plan.ring, k.pitch, t["ni"], channels, t["g"], lines)
    # Three barriers a slot, and one a channel of each.
    barriers = _plan.round_up(plan.slots * 8 * (3 + plan.channels), 128)
    base = barriers + k.zero + plan.channels * _plan.table_bytes(shape.kh, shape.kw, columns(t), shape.planes)
    assert base + shape.planes * plan.ring.set == plan.launch.shared_bytes
    # A thread makes one of either, and clears a word of the row of zeros.
    assert plan.launch.block >= max(plan.slots * 3, plan.slots * plan.channels, k.zero // 4)
    # Rows above the image have addresses too, which must not pass below zero.
    assert base >= (k.gr + 1) * k.pitch


@many
@given(problems(CHANNELS_LAST[1:]))
def test_the_weight_gradients_rings_fit_shared_memory(simulation, problem):
    shape, _, plan = problem
    t = template(plan)
    k, channels = weight_grad(simulation, t), 8 // t["wg"]
    check_ring(plan.x_ring, k.x_pitch, t["ni"], channels, 1, plan.x_slots * t["sr"])
    check_ring(plan.y_ring, k.y_pitch, t["ni"], channels, 1, plan.y_slots * t["sr"])
    # dy's fragments are loaded two column blocks at a time: the last may reach 16 bytes past the ring.
    rings, taps = shape.planes * (plan.x_ring.set + plan.y_ring.set) + 16, 2 * t["r"] * shape.kw
    reduction = 8 * (k.nd * 64 + taps + taps % 2) * 4
    assert 512 + k.zero + max(rings, reduction) <= plan.launch.shared_bytes
    # Two barriers a slot of either ring, each made by a thread.
    assert 16 * (plan.x_slots + plan.y_slots) <= 512
    assert plan.launch.block >= 2 * (plan.x_slots + plan.y_slots)


@many
@given(problems(CHANNELS_LAST))
def test_the_rings_hold_a_set_with_its_halo(simulation, problem):
    shape, _, plan = problem
    t = template(plan)
    rows, slots = (k_rows(simulation, t), plan.slots) if "mt" in t else (t["sr"], plan.x_slots)
    assert slots >= 1 + 2 * plan.halo
    assert plan.item_rows % rows == 0
    if plan.halo == 0:
        assert shape.h <= rows
    else:
        # The last kernel row pair reaches one row further than an odd kernel.
        assert (plan.halo - 1) * rows < shape.kh // 2 + 1 <= plan.halo * rows
    if "r" in t:
        assert t["sr"] % weight_grad(simulation, t).set_rows == 0
        # A warp's kernel rows, addressed from its first, pass the end of the ring once at most.
        assert plan.halo == 0 or 2 * (t["r"] + t["hb"] - 2) <= slots * rows


@many
@given(problems(tuple(PLANS)))
def test_the_columns_are_covered_with_their_halo(problem):
    shape, _, plan = problem
    t = template(plan)
    tiles, reach = range(0, shape.w, t["cbo"] * 8), shape.kw // 2
    assert t["off"] >= 0
    for col0 in tiles:
        last = min(shape.w, col0 + t["cbo"] * 8) - 1
        first_loaded = col0 - 8 * t["off"]
        assert first_loaded <= max(0, col0 - reach)
        assert first_loaded + 8 * t["cbi"] > min(shape.w - 1, last + reach)


@many
@given(problems(CONTIGUOUS))
def test_the_planned_column_tiles_are_the_kernels(problem):
    shape, _, plan = problem
    t = template(plan)
    cuts = _plan.columns_of(shape.w, shape.kw)
    assert (cuts.inputs, cuts.outputs, cuts.offset) == (t["cbi"], t["cbo"], t["off"])
    # The kernel counts the tiles for itself.
    assert cuts.tiles == math.ceil(shape.w / (8 * t["cbo"]))


def covered_once(pieces, total: int) -> bool:
    return sorted(i for piece in pieces for i in piece if i < total) == list(range(total))


@many
@given(problems(("forward",)))
def test_forward_tasks_cover_every_row_and_image_once(simulation, problem):
    shape, _, plan = problem
    t = template(plan)
    k = forward(simulation, t)
    items_of_rows = [range(r, min(shape.h, r + plan.item_rows)) for r in range(0, shape.h, plan.item_rows)]
    assert covered_once(items_of_rows, shape.h)
    for rows in {len(items_of_rows[0]), len(items_of_rows[-1])}:
        sets = math.ceil(rows / k.set_rows) * k.set_tasks
        starts = [s // k.set_tasks * k.set_rows + s % k.set_tasks for s in range(sets)]
        assert covered_once(([h0 + g + k.ts * i for g in range(k.gr) for i in range(k.mt)] for h0 in starts), rows)
    assert plan.item_images % k.ni == 0


@many
@given(problems(("forward",)))
def test_forward_steps_reach_every_kernel_row_inside_the_image(simulation, problem):
    shape, _, plan = problem
    k = forward(simulation, template(plan))
    for h0 in {0, plan.item_rows // 2, shape.h - 1}:
        e0, e1 = max(0, k.p - h0 - k.gr) & ~1, min(k.khp + k.ts * (k.mt - 1), shape.h - h0 + k.p)
        for g in range(k.gr):
            for tile in range(k.mt):
                h = h0 + g + k.ts * tile
                for ky in range(max(0, k.p - h), min(shape.kh, shape.h + k.p - h)) if h < shape.h else ():
                    assert e0 <= (ky & ~1) + k.ts * tile < e1


@many
@given(problems(CHANNELS_LAST[:1]))
def test_channels_last_tiles_cover_the_rows_of_a_slot(simulation, problem):
    _, _, plan = problem
    k = forward(simulation, template(plan))
    assert covered_once([[g + k.ts * i for g in range(k.gr) for i in range(k.mt)]], k.ts * k.mt)
    assert k.ni <= 8


@many
@given(problems(("weight_grad", "weight_grad, channels_last")))
def test_weight_gradient_covers_rows_kernel_rows_and_items(simulation, problem):
    shape, _, plan = problem
    t = template(plan)
    k, last_rows = weight_grad(simulation, t), t.get("sr") or plan.item_rows
    most = min(shape.h, last_rows)
    for rows in {most, shape.h % last_rows or most}:
        sets = math.ceil(rows / k.set_rows) * k.set_tasks
        starts = [s // k.set_tasks * k.set_rows + s % k.set_tasks for s in range(sets)]
        assert covered_once(([h + g + 2 * b for g in range(k.gr) for b in range(k.hb)] for h in starts), rows)
    a_block = t["r"] * t["wg"] * 2 if "wg" in t else shape.kh
    groups = plan.launch.grid[2]
    assert (groups - 1) * a_block < shape.kh <= groups * a_block
    if "nchw" in plan.launch.expression:
        assert (k.wg - 1) * t["r"] * 2 < shape.kh <= k.wg * t["r"] * 2
    images = t["ni"] if "sr" in t else plan.item_images
    items = math.ceil(shape.n / images) * math.ceil(shape.h / plan.item_rows) * math.ceil(shape.w / (8 * t["cbo"]))
    if "nchw" in plan.launch.expression:
        assert 1 <= plan.splits == plan.launch.grid[1] <= items
        # Every split has an item, so that every partial sum is one of something.
        assert all(items * s // plan.splits < items * (s + 1) // plan.splits for s in range(plan.splits))
        assert plan.launch.grid[0] == shape.c
        return
    cluster, runs, _ = plan.launch.grid
    assert cluster == t["cluster"]
    groups = math.ceil(shape.c / (8 // t["wg"] * cluster))
    rest = groups % runs * items
    # What is not dealt out whole is, and every run has something.
    assert (plan.share - 1) * runs < max(1, rest) <= plan.share * runs
    assert groups >= runs or (runs - 1) * plan.share < rest


@many
@given(problems(("forward",)))
def test_the_blocks_share_out_every_item_once(problem):
    shape, _, plan = problem
    t, blocks = template(plan), plan.launch.grid[0]
    per_channel = math.ceil(shape.n / plan.item_images) * math.ceil(shape.h / plan.item_rows)
    items = per_channel * math.ceil(shape.w / (8 * t["cbo"])) * shape.c
    assert items < 2**31
    assume(items <= 30000)
    runs = [range(items * block // blocks, items * (block + 1) // blocks) for block in range(blocks)]
    assert covered_once(runs, items)
    assert all(len(run) for run in runs), "a block without work"


@many
@given(problems(CHANNELS_LAST[:1]))
def test_neighbouring_blocks_walk_the_same_pieces_with_channels_of_their_own(ring, simulation, problem):
    shape, gpu, plan = problem
    t, blocks = template(plan), plan.launch.grid[0]
    pieces = ring.Pieces(shape, t["ni"], t["cbo"] * 8, plan.item_rows, k_rows(simulation, t), plan.halo)
    assert blocks % plan.share == 0
    assert blocks <= gpu.multiprocessors * t["minb"]
    assert pieces.count < 2**31
    assume(pieces.count * math.ceil(shape.c / plan.channels) <= 20000)
    walks = [ring.forward_walk(pieces, shape, plan, block) for block in range(blocks)]
    for first in range(0, blocks, plan.share):
        assert walks[first], "a block without work"
        for i, walk in enumerate(walks[first : first + plan.share]):
            assert walk == [replace(item, c0=item.c0 + i * plan.channels) for item in walks[first]]
    found = Counter((item.c0, item.n0, item.col0, item.row0) for walk in walks for item in walk)
    every = itertools.product(
        range(0, shape.c, plan.channels), range(0, shape.n, t["ni"]), range(0, shape.w, 8 * t["cbo"]),
        range(0, shape.h, plan.item_rows),
    )  # fmt: skip
    assert found == Counter(every)


@many
@given(problems(("forward",)))
def test_items_are_decoded_one_to_one(simulation, problem):
    shape, _, plan = problem
    k = forward(simulation, template(plan))
    n_items = shape.c * math.ceil(shape.n / plan.item_images) * math.ceil(shape.h / plan.item_rows)
    n_items *= math.ceil(shape.w / (8 * k.columns.outputs))
    assume(n_items <= 5000)
    decoded = [simulation.decode(item, k, plan, shape) for item in range(n_items)]
    assert len({tuple(item[key] for key in ("c", "n0", "row0", "col0")) for item in decoded}) == n_items
    assert all(0 <= item["c"] < shape.c and 0 <= item["n0"] < shape.n for item in decoded)
    assert all(0 <= item["row0"] < shape.h and 0 <= item["col0"] < shape.w for item in decoded)


def banks(pitch: int, stride: int, ni: int, first: int, line: int, lines: int) -> set[int]:
    """16-byte columns of the banks in which lanes first .. first + 7 find their rows, from a line of the buffer on."""
    return {(m % ni * stride + (line + m // ni) % lines * pitch) // 16 % 8 for m in range(first, first + 8)}


@many
@given(problems(CONTIGUOUS))
def test_eight_lanes_of_a_matrix_never_meet_in_a_bank(simulation, problem):
    shape, _, plan = problem
    t = template(plan)
    if "mt" in t:
        k, rows = forward(simulation, t), min(shape.h, plan.item_rows + 2 * (shape.kh // 2))
        buffers = [(k.pitch, plan.stride, rows)]
    else:
        k, reach = weight_grad(simulation, t), 2 * (shape.kh // 2)
        buffers = [
            (k.x_pitch, plan.x_stride, min(shape.h, plan.item_rows + reach)),
            (k.y_pitch, plan.y_stride, min(shape.h, plan.item_rows)),
        ]
    for pitch, stride, rows in buffers:
        assert stride >= rows * pitch
        assert stride % 16 == pitch % 16 == 0
        assert all(len(banks(pitch, stride, k.ni, first, 0, 16)) == 8 for first in (0, 8))


@many
@given(problems(CHANNELS_LAST))
def test_eight_lanes_never_meet_in_a_bank_where_the_ring_begins_again(simulation, problem):
    _, _, plan = problem
    t = template(plan)
    if "mt" in t:
        k = forward(simulation, t)
        rings = [(k.pitch, plan.ring.stride, plan.slots * k_rows(simulation, t))]
    else:
        k = weight_grad(simulation, t)
        rings = [(k.x_pitch, plan.x_ring.stride, plan.x_slots * t["sr"]), (k.y_pitch, plan.y_ring.stride, t["sr"])]
    for pitch, stride, lines in rings:
        for line in {0, 1, *range(max(0, lines - 17), lines)}:
            assert all(len(banks(pitch, stride, k.ni, first, line, lines)) == 8 for first in (0, 8))


@given(st.integers(1, 4096), st.integers(1, 200000), st.integers(1, 2000))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_splits_are_between_one_and_the_items(channels, items, slots):
    splits = _plan.splits_of(channels, items, slots)
    assert 1 <= splits <= min(items, 65535)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.arch)
@pytest.mark.parametrize("which", ["forward", "weight_grad"])
def test_contiguous_16_bit_plans_exist_for_every_kernel_up_to_63(gpu, which):
    """Any map: where a row is wide it is cut, where there are many rows or images an item has a part of them."""
    for kh in (1, 3, 13, 31, 63):
        for kw in (1, 3, 13, 31, 63):
            for h in (1, 7, 14, 56, 200):
                for w in (1, 7, 14, 56, 64, 65, 320):
                    for n in (1, 256):
                        PLANS[which](shape_for(which, n, 64, h, w, kh, kw, torch.float16, 1), gpu)


def test_what_does_not_fit_says_so_with_sizes():
    shape = Shape(1, 8, 200, 320, 63, 63, torch.float16, 1, 16)
    with pytest.raises(
        NotImplementedError, match=r"63x63 kernel on 200x320 maps in torch.float16 .* 40000 bytes .*sm_x"
    ):
        _plan.forward_plan(shape, Gpu("sm_x", 10, 40000))
    for plan in (_plan_channels_last.forward_plan, _plan_channels_last.weight_grad_plan):
        with pytest.raises(NotImplementedError, match=r"63x63 kernel on 200x320 maps in torch.float16 .* 20000 bytes"):
            plan(shape, Gpu("sm_x", 10, 20000))


# ---- the constants of the C++ templates
def columns(t: dict[str, int]) -> Columns:
    return Columns(t["cbi"], t["cbo"], t["off"], 1)


def forward(simulation, t):
    warps = t["warps"] + t["prod"]
    return simulation.Forward(t["kh"], t["kw"], columns(t), t["ni"], t["mt"], warps, t["minb"])


def k_rows(simulation, t) -> int:
    """Rows of a slot of forward_nhwc."""
    k = forward(simulation, t)
    return k.ts * k.mt


def weight_grad(simulation, t):
    return simulation.WeightGrad(t["kh"], t["kw"], columns(t), t["ni"], t["r"], t["hb"])


def forward_constants(k, t) -> dict[str, int]:
    """What the plan and the simulation say of the members of `Forward<...>`."""
    low, high = _plan.deltas(t["kw"], columns(t))
    pitch, _ = _plan.image_stride(1, t["cbi"], t["ni"])
    return {
        "LO": low, "HI": high, "ND": k.nd, "P": k.p, "KHP": k.khp, "GR": k.gr, "TS": k.ts, "SET_ROWS": k.set_rows,
        "SET_TASKS": k.set_tasks, "PITCH": pitch, "ZERO": _plan.round_up(t["cbi"] * 16, 128), "HEAD": _plan.HEAD,
        "TABLE": _plan.table_bytes(t["kh"], t["kw"], columns(t), t["np"]), "WINDOW": int(k.window),
        "REGISTERS": k.registers, "AHEAD": k.ahead,
        "EARLY": int(k.early), "SKIPS": int(k.skips), "NARROW": int(k.narrow(t["dt"], t["v"])),
        "STAGING": k.staging(t["dt"], t["v"]), "SPAN": k.span,
        "T::OFFSET": k.table.offset, "T::NU": k.table.nu, "T::COPY": k.table.copy, "T::PLANE": 2 * k.table.copy,
    }  # fmt: skip


def weight_grad_constants(k, t) -> dict[str, int]:
    """What the plan and the simulation say of the members of `WeightGrad<...>`."""
    low, high = _plan.deltas(t["kw"], columns(t))
    (x_pitch, _), (y_pitch, _) = (_plan.image_stride(1, blocks, t["ni"]) for blocks in (t["cbi"], t["cbo"]))
    constants = {
        "LO": low, "HI": high, "ND": k.nd, "P": k.p, "GR": k.gr, "JP": k.jp, "SET_ROWS": k.set_rows,
        "SET_TASKS": k.set_tasks, "XPITCH": x_pitch, "YPITCH": y_pitch, "HEAD": _plan.HEAD, "KQ": k.kq,
        "ZERO": _plan.round_up(max(t["cbi"], t["cbo"] + 1) * 16, 128), "SUMS": _plan.diagonal_floats(low, high),
    }  # fmt: skip
    # The channels_last kernel shares out its warps for itself.
    return constants if "wg" in t else constants | {"WG": k.wg, "WS": t["warps"] // k.wg}


def units_constants(simulation, plan, t) -> dict[str, dict[str, int]]:
    """What the simulation says of every `Units<...>` of a channels_last plan."""
    found, size, cluster = {}, 4 if t["dt"] == 2 else 2, t["cluster"]
    if "mt" in t:
        k, groups, channels, depth = forward(simulation, t), t["g"], 8, 8
        rows, together = k.ts * k.mt, (cluster > 1, cluster > 1 and t["g"] == 1)
        kinds = (t["cbi"], k.pitch, t["loaders"], together[0]), (t["cbo"], k.pitch, t["storers"], together[1])
    else:
        k, groups, channels, rows, depth = weight_grad(simulation, t), 1, 8 // t["wg"], t["sr"], 8 if t["taken"] else 16
        kinds = [(n, pitch, t["loaders"], cluster > 1) for n, pitch in ((t["cbi"], k.x_pitch), (t["cbo"], k.y_pitch))]
    for blocks, pitch, warps, together in kinds:
        place = size, t["np"], blocks, pitch, t["ni"]
        if together:
            # Whole groups, or one of which every block has a part.
            all_groups, all_channels = (groups * cluster, 8) if "mt" in t else (1, channels * cluster)
            u = simulation.SharedUnits(*place, all_groups, all_channels, t["v"], warps * cluster, cluster, 0)
            arguments = all_groups, all_channels, t["v"], rows, warps * cluster, depth, cluster
            kind, constants = "SharedUnits", {"MINE": u.mine, "P::PER": u.per, "SIZE": size}
        else:
            u = simulation.Units(*place, groups, t["v"], rows, warps, depth=8)
            arguments, kind = (groups, channels, t["v"], rows, warps, 8), "Units"
            constants = {
                "LINE": u.line, "LINES": u.lines, "CHUNKS": u.chunks, "BATCH": u.batch, "PIXELS": u.pixels,
                "P::PER": u.per, "P::SIZE": size,
            }  # fmt: skip
        found[f"{kind}<{', '.join(map(str, (t['dt'], *place[1:], *arguments)))}>"] = constants
    return found


def sample_of_plans(count: int):
    """Plans for random shapes, the same at every run."""
    rng = random.Random(0)
    while count:
        which, gpu = rng.choice(tuple(PLANS)), rng.choice(GPUS)
        dtype, planes = rng.choice([(torch.float16, 1), (torch.bfloat16, 1), (torch.float32, 2), (torch.float32, 3)])
        n, c, h, w = rng.choice((1, 3, 64)), rng.choice((3, 8, 512)), rng.randint(1, 130), rng.randint(1, 130)
        kh, kw = rng.randrange(1, 64, 2), rng.randrange(1, 64, 2)
        try:
            yield PLANS[which](shape_for(which, n, c, h, w, kh, kw, dtype, planes), gpu)
        except NotImplementedError:
            continue
        count -= 1


def probe(simulation, plan, number: int) -> str:
    """C++ that compiles where the plan's constants are the template's."""
    t = template(plan)
    if "mt" in t:
        names, constants = "dt np kh kw cbi cbo off ni mt v sv warps prod minb", forward_constants
        kind, k = "Forward", forward(simulation, t)
    else:
        names, constants = "dt np kh kw cbi cbo off ni r hb v warps prod stages", weight_grad_constants
        kind, k = "WeightGrad", weight_grad(simulation, t)
    # As the channels_last kernels call them: they neither copy nor store with these, and have no stages.
    fixed = {"v": 2, "sv": 1, "prod": t["prod"] if "mt" in t else 1, "stages": 1}
    values = t | fixed if "loaders" in t else t
    arguments = ", ".join(str(values[name]) for name in names.split())
    checked = {f"{kind}<{arguments}>": constants(k, values)}
    if "loaders" in t:
        checked |= units_constants(simulation, plan, t)
    lines = []
    for i, (type_, members) in enumerate(checked.items()):
        lines.append(f"using K{number}_{i} = {type_};")
        for member, value in members.items():
            lines.append(f'static_assert(K{number}_{i}::{member} == {value}, "{type_}: {member}");')
    return "\n".join(lines)


def test_the_plans_constants_are_the_kernels(simulation):
    core = pytest.importorskip("cuda.core", reason="needs cuda-core, NVRTC's front end")
    probes = [probe(simulation, plan, number) for number, plan in enumerate(sample_of_plans(150))]
    text = "\n".join([source(_plan_channels_last.CHANNELS_LAST), *probes])
    options = core.ProgramOptions(arch="sm_90", std="c++17", minimal=True)
    core.Program(text, "c++", options).compile("cubin")
    with pytest.raises(Exception, match="static assertion failed"):
        core.Program(text + "\nstatic_assert(K0_0::HEAD == 1);", "c++", options).compile("cubin")
