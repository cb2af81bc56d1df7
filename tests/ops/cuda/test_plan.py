"""Plans for any shape and GPU: they fit, cover every output once, and agree with the kernels' own constants."""

import math
import random

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
    Gpu("sm_90", 132, 232448),
    Gpu("sm_100", 148, 232448),
    Gpu("sm_120", 170, 101376),
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
    "forward_nhwc": "dt kh kw cbi cbo off ni mt v prod stages minb",
    "weight_grad_nhwc": "dt kh kw cbi cbo off ni r hb v prod stages minb",
}


def template(plan) -> dict[str, int]:
    """The template arguments of a plan by name; channels_last kernels have one plane and 8 consumer warps."""
    name, arguments = plan.launch.expression.rstrip(">").split("<")
    values = dict(zip(TEMPLATES[name].split(), map(int, arguments.split(", ")), strict=True))
    return {"np": 1, "warps": 8} | values


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
    dtype, planes = draw(TYPES if "channels_last" not in name else st.just((torch.bfloat16, 1)))
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
    # The head holds two barriers a stage in 128 bytes and a counter a stage behind them.
    assert t["stages"] * 16 <= 128
    assert 128 + t["stages"] * 4 <= _plan.HEAD


@many
@given(problems(tuple(PLANS)))
def test_copies_are_as_wide_as_the_alignment_allows(problem):
    shape, _, plan = problem
    v = template(plan)["v"]
    assert v in (2, 4, 8, 16)
    assert v == 2 or (shape.dtype != torch.float32 and v <= shape.align)


@many
@given(problems(("forward",)))
def test_forward_buffers_fit_shared_memory(simulation, problem):
    _, _, plan = problem
    t = template(plan)
    k = forward(simulation, t)
    stage = k.table_bytes + t["np"] * plan.stride * plan.item_images
    assert _plan.HEAD + k.zero + t["stages"] * stage <= plan.launch.shared_bytes
    assert plan.launch.block >= k.zero // 4, "a thread clears one word of the row of zeros"


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


@many
@given(problems(("forward, channels_last", "weight_grad, channels_last")))
def test_channels_last_buffers_fit_shared_memory(simulation, problem):
    shape, _, plan = problem
    t = template(plan)
    if "mt" in t:
        k, window = forward(simulation, t), min(shape.h, plan.item_rows + 2 * (shape.kh // 2))
        planes = 8 * k.table_bytes + math.ceil(8 * plan.plane / 128) * 128
        stage, reduction = plan.item_images * window * t["cbi"] * 128, 0
    else:
        k, rows = weight_grad(simulation, t), min(t["kh"], 2 * t["r"]) - 1
        window = min(shape.h, plan.item_rows + rows)
        planes = math.ceil(8 * plan.x_plane / 128) * 128 + math.ceil((8 * plan.y_plane + 128) / 128) * 128
        stage = plan.item_images * (window * t["cbi"] + plan.item_rows * t["cbo"]) * 128
        reduction = 8 * (k.nd * 64 + t["r"] * 2 * t["kw"]) * 4
    assert _plan.HEAD + k.zero + max(planes + t["stages"] * stage, reduction) <= plan.launch.shared_bytes


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
@given(problems(("forward", "weight_grad")))
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
@given(problems(("forward, channels_last",)))
def test_channels_last_tiles_cover_the_rows_of_an_item(simulation, problem):
    shape, _, plan = problem
    k = forward(simulation, template(plan))
    rows = min(plan.item_rows, shape.h)
    assert covered_once([[g + k.ts * i for g in range(k.gr) for i in range(k.mt)]], rows)
    assert k.ni <= 8
    assert plan.item_images % k.ni == 0


@many
@given(problems(("weight_grad", "weight_grad, channels_last")))
def test_weight_gradient_covers_rows_kernel_rows_and_items(simulation, problem):
    shape, _, plan = problem
    t = template(plan)
    k = weight_grad(simulation, t)
    for rows in {min(shape.h, plan.item_rows), shape.h % plan.item_rows or min(shape.h, plan.item_rows)}:
        sets = math.ceil(rows / k.set_rows) * k.set_tasks
        starts = [s // k.set_tasks * k.set_rows + s % k.set_tasks for s in range(sets)]
        assert covered_once(([h + g + 2 * b for g in range(k.gr) for b in range(k.hb)] for h in starts), rows)
    groups = plan.launch.grid[2] if "nhwc" in plan.launch.expression else t["warps"] // (t["warps"] // k.wg)
    assert (groups - 1) * t["r"] * 2 < shape.kh <= groups * t["r"] * 2
    n_cols = math.ceil(shape.w / (8 * t["cbo"]))
    items = math.ceil(shape.n / plan.item_images) * math.ceil(shape.h / plan.item_rows) * n_cols
    assert 1 <= plan.splits == plan.launch.grid[1] <= items
    # Every split has an item, so that every partial sum is one of something.
    assert all(items * s // plan.splits < items * (s + 1) // plan.splits for s in range(plan.splits))


@many
@given(problems(("forward", "forward, channels_last")))
def test_the_blocks_share_out_every_item_once(problem):
    shape, _, plan = problem
    t, blocks = template(plan), plan.launch.grid[0]
    channel_blocks = shape.c if "nchw" in plan.launch.expression else math.ceil(shape.c / 8)
    per_channel = math.ceil(shape.n / plan.item_images) * math.ceil(shape.h / plan.item_rows)
    items = per_channel * math.ceil(shape.w / (8 * t["cbo"])) * channel_blocks
    assert items < 2**31
    assume(items <= 30000)
    if "nhwc" in plan.launch.expression and blocks % channel_blocks == 0:
        runs = [range(block, items, blocks) for block in range(blocks)]
        assert all(len({item % channel_blocks for item in run}) == 1 for run in runs), "a block keeps its channels"
    else:
        runs = [range(items * block // blocks, items * (block + 1) // blocks) for block in range(blocks)]
    assert covered_once(runs, items)
    assert all(len(run) for run in runs), "a block without work"


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


@many
@given(problems(tuple(PLANS)))
def test_eight_lanes_of_a_matrix_never_meet_in_a_bank(simulation, problem):
    shape, _, plan = problem
    t = template(plan)
    if "mt" in t:
        k, rows = forward(simulation, t), min(shape.h, plan.item_rows + 2 * (shape.kh // 2))
        buffers = [(k.pitch, plan.stride, rows)]
    else:
        k = weight_grad(simulation, t)
        reach = 2 * (shape.kh // 2) if "nchw" in plan.launch.expression else min(shape.kh, 2 * t["r"]) - 1
        buffers = [
            (k.x_pitch, plan.x_stride, min(shape.h, plan.item_rows + reach)),
            (k.y_pitch, plan.y_stride, min(shape.h, plan.item_rows)),
        ]
    for pitch, stride, rows in buffers:
        assert stride >= rows * pitch
        assert stride % 16 == pitch % 16 == 0
        for first in (0, 8):
            slots = {(m % k.ni * stride + m // k.ni * pitch) // 16 % 8 for m in range(first, first + 8)}
            assert len(slots) == 8
    for plane in (getattr(plan, name) for name in ("plane", "x_plane", "y_plane") if hasattr(plan, name)):
        assert plane % 128 == 16, "the 8 planes of a pixel are stored at once"


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
    with pytest.raises(NotImplementedError, match="float32 has no channels_last kernel"):
        _plan_channels_last.forward_plan(Shape(1, 8, 9, 9, 3, 3, torch.float32, 3, 16), GPUS[3])


# ---- the constants of the C++ templates
def columns(t: dict[str, int]) -> Columns:
    return Columns(t["cbi"], t["cbo"], t["off"], 1)


def forward(simulation, t):
    return simulation.Forward(t["kh"], t["kw"], columns(t), t["ni"], t["mt"])


def weight_grad(simulation, t):
    return simulation.WeightGrad(t["kh"], t["kw"], columns(t), t["ni"], t["r"], t["hb"])


def forward_constants(k, t) -> dict[str, int]:
    """What the plan and the simulation say of the members of `Forward<...>`."""
    low, high = _plan.deltas(t["kw"], columns(t))
    pitch, _ = _plan.image_stride(1, t["cbi"], t["ni"])
    return {
        "LO": low, "HI": high, "ND": k.nd, "P": k.p, "KHP": k.khp, "GR": k.gr, "TS": k.ts, "SET_ROWS": k.set_rows,
        "SET_TASKS": k.set_tasks, "PITCH": pitch, "ZERO": _plan.round_up(t["cbi"] * 16, 128), "HEAD": _plan.HEAD,
        "TABLE": _plan.table_bytes(t["kh"], t["kw"], columns(t), t["np"]), "WINDOW": int(k.ts == 2),
        "T::OFFSET": k.table.offset, "T::NU": k.table.nu, "T::COPY": k.table.copy, "T::PLANE": 2 * k.table.copy,
    }  # fmt: skip


def weight_grad_constants(k, t) -> dict[str, int]:
    """What the plan and the simulation say of the members of `WeightGrad<...>`."""
    low, high = _plan.deltas(t["kw"], columns(t))
    (x_pitch, _), (y_pitch, _) = (_plan.image_stride(1, blocks, t["ni"]) for blocks in (t["cbi"], t["cbo"]))
    return {
        "LO": low, "HI": high, "ND": k.nd, "P": k.p, "GR": k.gr, "JP": k.jp, "SET_ROWS": k.set_rows,
        "SET_TASKS": k.set_tasks, "XPITCH": x_pitch, "YPITCH": y_pitch, "HEAD": _plan.HEAD, "KQ": k.kq, "WG": k.wg,
        "ZERO": _plan.round_up(max(t["cbi"], t["cbo"] + 1) * 16, 128), "WS": t["warps"] // k.wg,
    }  # fmt: skip


def sample_of_plans(count: int):
    """Plans for random shapes, the same at every run."""
    rng = random.Random(0)
    while count:
        which, gpu = rng.choice(tuple(PLANS)), rng.choice(GPUS)
        dtype, planes = rng.choice(
            [(torch.float16, 1), (torch.bfloat16, 1), (torch.float32, 2), (torch.float32, 3)][
                : 2 if "channels_last" in which else 4
            ]
        )
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
        names, constants = "dt np kh kw cbi cbo off ni mt v sv warps prod stages", forward_constants
        kind, k = "Forward", forward(simulation, t)
    else:
        names, constants = "dt np kh kw cbi cbo off ni r hb v warps prod stages", weight_grad_constants
        kind, k = "WeightGrad", weight_grad(simulation, t)
    arguments = ", ".join(str(({"sv": 1} | t)[name]) for name in names.split())
    lines = [f"using K{number} = {kind}<{arguments}>;"]
    for member, value in constants(k, t).items():
        lines.append(f'static_assert(K{number}::{member} == {value}, "{plan.launch.expression}: {member}");')
    return "\n".join(lines)


def test_the_plans_constants_are_the_kernels(simulation):
    core = pytest.importorskip("cuda.core", reason="needs cuda-core, NVRTC's front end")
    probes = [probe(simulation, plan, number) for number, plan in enumerate(sample_of_plans(150))]
    text = "\n".join([source(_plan_channels_last.CHANNELS_LAST), *probes])
    options = core.ProgramOptions(arch="sm_90", std="c++17", minimal=True)
    core.Program(text, "c++", options).compile("cubin")
    with pytest.raises(Exception, match="static assertion failed"):
        core.Program(text + "\nstatic_assert(K0::HEAD == 1);", "c++", options).compile("cubin")
