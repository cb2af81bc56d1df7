"""Every kernel that the default plans choose for real networks compiles for every architecture, within its resources.

The ordinary run compiles a few important kernels for six architectures; the slow one a sample of all, drawn by hash and
the same at every run, because all of them would take the better part of an hour.
"""

import hashlib
import io
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from replknet.ops.cuda import _plan, _plan_channels_last, _plan_diagonal, _plan_direct
from replknet.ops.cuda._compile import _nvrtc, source
from replknet.ops.cuda._launch import Gpu
from replknet.ops.cuda._plan import Shape

# Before the threads: two first imports of this package at once do not go well.
core = pytest.importorskip("cuda.core", reason="needs cuda-core, NVRTC's front end")

GPUS = (
    Gpu("sm_80", 108, 166912),
    Gpu("sm_86", 84, 101376),
    Gpu("sm_89", 128, 101376),
    Gpu("sm_90a", 132, 232448, clusters=True),
    Gpu("sm_100a", 148, 232448, clusters=True),
    Gpu("sm_120a", 170, 101376, clusters=True),
)


def direct_forward_plan(shape: Shape, gpu: Gpu) -> _plan.SmallKernelPlan:
    if not _plan_direct.suits(shape, weight_grad=False):
        raise NotImplementedError
    return _plan_direct.forward_plan(shape, gpu, flags=0)


def direct_weight_grad_plan(shape: Shape, gpu: Gpu) -> _plan.SmallKernelPlan:
    if not _plan_direct.suits(shape, weight_grad=True):
        raise NotImplementedError
    return _plan_direct.weight_grad_plan(shape, gpu)


def diagonal_weight_grad_plan(shape: Shape, gpu: Gpu) -> _plan.SmallKernelPlan:
    if not _plan_diagonal.suits(shape):
        raise NotImplementedError
    return _plan_diagonal.weight_grad_plan(shape, gpu)


PASSES = {
    "forward": _plan.forward_plan,
    "weight_grad": _plan.weight_grad_plan,
    "forward, channels_last": _plan_channels_last.forward_plan,
    "weight_grad, channels_last": _plan_channels_last.weight_grad_plan,
    "forward, channels_last, direct": direct_forward_plan,
    "weight_grad, channels_last, direct": direct_weight_grad_plan,
    "weight_grad, channels_last, diagonal": diagonal_weight_grad_plan,
}
DIRECT = ("forward, channels_last, direct", "weight_grad, channels_last, direct")
SAMPLE = 300


def squares(*sizes: int) -> list[tuple[int, int]]:
    return [(k, k) for k in sizes]


def stripes(k: int) -> list[tuple[int, int]]:
    return [(k, 5), (5, k), (5, 5)]


# Network: channels and kernels of its stages, sizes of the picture. The maps are a quarter of it, halved at each stage.
NETWORKS = {
    "RepLKNet-31B": ((128, 256, 512, 1024), [squares(k, 5) for k in (31, 29, 27, 13)], (224, 384, 512, 769, 1024)),
    "RepLKNet-31L": ((192, 384, 768, 1536), [squares(k, 5) for k in (31, 29, 27, 13)], (224, 384)),
    "RepLKNet-XL": ((384, 768, 1536, 3072), [squares(k, 5) for k in (27, 27, 27, 13)], (224, 320)),
    "UniRepLKNet-S": ((96, 192, 384, 768), [squares(3), *[squares(13, 7, 5, 3)] * 3], (224, 384)),
    "SLaK-T": ((124, 249, 499, 998), [stripes(k) for k in (51, 49, 47, 13)], (224, 384)),
    "ConvNeXt-B": ((128, 256, 512, 1024), [squares(7)] * 4, (224, 384, 512)),
    "InceptionNeXt-T": ((12, 24, 48, 96), [[(3, 3), (1, 11), (11, 1)]] * 4, (224, 384)),
    "OverLoCK-T": ((64, 128, 256, 512), [squares(k) for k in (17, 15, 13, 7)], (224, 384)),
}
TYPES = ((torch.float16, 1), (torch.bfloat16, 1), (torch.float32, 2), (torch.float32, 3))


def workloads() -> list[tuple[int, int, int, int]]:
    """(channels, map size, Kh, Kw) of every stage."""
    found = []
    for channels, kernels, pictures in NETWORKS.values():
        for picture in pictures:
            height = (picture + 3) // 4
            for c, stage in zip(channels, kernels, strict=True):
                found += [(c, height, *kernel) for kernel in stage]
                height = (height + 1) // 2
    return list(dict.fromkeys(found))


def plan_of(which: str, gpu: Gpu, n, c, size, kh, kw, dtype, planes):
    """The default plan for a freshly allocated tensor, or None where the pass runs another way."""
    n_bytes = (c if "channels_last" in which else size) * (4 if dtype == torch.float32 else 2)
    shape = Shape(n, c, size, size, kh, kw, dtype, planes, min(16, n_bytes & -n_bytes))
    try:
        return PASSES[which](shape, gpu)
    except NotImplementedError:
        # Channels_last tensors then run on contiguous copies; a contiguous plan has to exist.
        assert "channels_last" in which, (which, gpu.arch, shape)
        return None


def every_instantiation():
    """{(sources, expression): {architecture: a plan}} over all workloads."""
    found = {}
    for gpu in GPUS:
        for c, size, kh, kw in workloads():
            for dtype, planes in TYPES:
                for which in PASSES:
                    for n in (1, 64):
                        if plan := plan_of(which, gpu, n, c, size, kh, kw, dtype, planes):
                            found.setdefault((plan.launch.expression, gpu), plan)
    return found


IMPORTANT = {
    "31x31 on 56x56": (tuple(PASSES)[:4], 64, 128, 56, 31, 31, torch.float16, 1),
    "27x27 on 14x14": (("forward", "weight_grad"), 64, 512, 14, 27, 27, torch.bfloat16, 1),
    "13x13 on 7x7": (("forward",), 64, 1024, 7, 13, 13, torch.float16, 1),
    "5x5 on 14x14": (DIRECT, 64, 512, 14, 5, 5, torch.bfloat16, 1),
    "7x7 on 56x56": (("weight_grad, channels_last, diagonal",), 64, 128, 56, 7, 7, torch.bfloat16, 1),
    "7x7 on 56x56 in float32": (DIRECT, 64, 128, 56, 7, 7, torch.float32, 3),
    "3x3 on 112x112, odd channels": (DIRECT, 64, 31, 112, 3, 3, torch.float16, 1),
    "51x5 on 56x56": (("forward",), 64, 124, 56, 51, 5, torch.bfloat16, 1),
    "31x31 on 56x56 in float32": (
        ("forward", "forward, channels_last", "weight_grad, channels_last"),
        64,
        128,
        56,
        31,
        31,
        torch.float32,
        3,
    ),
    "13x13 on 14x14 in TF32": (
        ("forward, channels_last", "weight_grad, channels_last"),
        64,
        512,
        14,
        13,
        13,
        torch.float32,
        2,
    ),
}


def important_plans() -> dict:
    plans = {}
    for label, (passes, *problem) in IMPORTANT.items():
        for which in passes:
            for gpu in GPUS:
                if plan := plan_of(which, gpu, *problem):
                    plans[f"{which}, {label}, {gpu.arch}"] = plan, gpu
    return plans


IMPORTANT_PLANS = important_plans()


def compile_all(plans: list) -> list:
    """Cubins of (plan, GPU), on two threads."""

    def one(job):
        plan, gpu = job
        return _nvrtc(source(plan.launch.sources), plan.launch.expression, gpu.arch)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, plans))


def expected_stack(expression: str) -> int:
    """Bytes of stack that are known and borne: a handful of registers where a tile is made as large as can be.

    Measured with NVRTC 13.0 over the sample of the slow test; 0 where no kernel has any.
    """
    kernel, arguments = expression.rstrip(">").split("<")
    values = [int(value) for value in arguments.split(", ")]
    blocks = values[4]
    if kernel in ("weight_grad_nchw", "weight_grad_nhwc") and values[1] == 3:
        # Products on their way to the sums, which tensor cores do not add up in float32.
        return 128
    if kernel == "forward_nchw":
        # One column block: eight blocks of 128 threads leave a thread 64 registers, three of 256 leave 80.
        return 64 if blocks == 1 else 8 if blocks < 7 else 64
    if kernel == "weight_grad_nchw":
        # One or two column blocks: up to 56 accumulators beside as few as 80 registers.
        return 48 if blocks == 1 else 88 if blocks == 2 else 16
    if kernel == "forward_nhwc":
        # More than two row tiles: up to 112 accumulators beside 168 registers, 56 beside 128. Else, of sixteen and
        # twenty warps, whose threads have 128 and 96: what those that move pixels have on their way.
        return 120 if values[8] > 2 else 56
    if kernel == "weight_grad_diagonal":
        return 0
    if kernel in ("forward_direct", "weight_grad_direct"):
        # Taps, sums and pixels on their way fill what a thread has, most where channels are read one by one.
        return 192
    # Kernel rows and deltas of a warp: up to 112 accumulators beside 168 registers, 160 beside 216. Loaders that read
    # channels one by one, or have given registers away.
    return 96


def faults(plan, gpu: Gpu, used) -> list[str]:
    """What is wrong with the resources of a compiled plan."""
    launch, found = plan.launch, []
    kernel, arguments = launch.expression.rstrip(">").split("<")
    blocks = 1 if kernel == "weight_grad_diagonal" else int(arguments.split(", ")[-1])
    warps, a_warp = launch.block // 32, -(-used.registers // 8) * 8 * 32
    if used.registers > 255 or blocks * warps * a_warp > 65536:
        found.append(f"{used.registers} registers for {blocks} blocks of {launch.block} threads")
    # Warps take registers out of those that the launch has given to all: with fewer they would wait for ever.
    taken, counted = kernel == "weight_grad_nhwc" and int(arguments.split(", ")[-2]), _plan_channels_last.LAUNCHED
    if taken and used.registers != counted:
        found.append(f"{used.registers} registers at the launch, {counted} are counted on")
    if used.stack > expected_stack(launch.expression):
        found.append(f"{used.stack} bytes of stack, {expected_stack(launch.expression)} are known")
    # 1 KiB is reserved by the system from sm_90 on, and is no part of the GPU's limit.
    if used.shared > 1024 or launch.shared_bytes > gpu.shared_bytes:
        found.append(f"{launch.shared_bytes} bytes of shared memory, {used.shared} static, of {gpu.shared_bytes}")
    return [f"{launch.expression} for {gpu.arch}: {what}" for what in found]


@pytest.fixture(scope="module")
def important_cubins() -> dict:
    compiled = compile_all(list(IMPORTANT_PLANS.values()))
    return dict(zip(IMPORTANT_PLANS, compiled, strict=True))


@pytest.mark.parametrize("label", IMPORTANT_PLANS)
def test_important_kernels_compile_within_their_resources(important_cubins, elf, label):
    plan, gpu = IMPORTANT_PLANS[label]
    compiled = important_cubins[label]
    assert plan.launch.expression.split("<")[0] in compiled.symbol
    assert faults(plan, gpu, elf.resources(compiled.cubin)) == []


def test_every_architecture_has_its_kernels():
    labels = set(IMPORTANT_PLANS)
    for gpu in GPUS:
        for label, (passes, *_) in IMPORTANT.items():
            for which in passes:
                assert f"{which}, {label}, {gpu.arch}" in labels


@pytest.mark.slow
def test_a_sample_of_all_kernels_compiles_within_its_resources(elf):
    """Kernels of every network, type, format and pass: every architecture has a sixth of the sample."""
    plans = every_instantiation()

    def by_hash(key) -> bytes:
        expression, gpu = key
        return hashlib.sha256(f"{expression} {gpu.arch}".encode()).digest()

    ordered = sorted(plans, key=by_hash)
    shares = [key for gpu in GPUS for key in [key for key in ordered if key[1] == gpu][: SAMPLE // len(GPUS)]]
    # Kernels that few networks need are few among all.
    one_of_each = {expression.split(",")[0]: (expression, gpu) for expression, gpu in reversed(ordered)}
    chosen = [(plans[key], key[1]) for key in dict.fromkeys([*shares, *one_of_each.values()])]
    heads = {plan.launch.expression.split(",")[0] for plan, _ in chosen}
    assert heads == {
        f"{kind}_{route}<{dtype}"
        for kind in ("forward", "weight_grad")
        for route in ("nchw", "nhwc", "direct")
        for dtype in range(3)
    } | {f"weight_grad_diagonal<{dtype}" for dtype in range(2)}
    compiled = compile_all(chosen)
    wrong = [
        fault
        for (plan, gpu), code in zip(chosen, compiled, strict=True)
        for fault in faults(plan, gpu, elf.resources(code.cubin))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.arch)
def test_elf_reader_reads_what_the_assembler_reports(elf, gpu):
    """A kernel made for it: an array that no register can hold, and static shared memory."""
    text = """
    __global__ void spills(int* p, int n) {
      __shared__ int s[300];
      int a[100];
      for (int i = 0; i < 100; i++) a[i * n % 100] = p[i];
      s[threadIdx.x] = a[n];
      __syncthreads();
      p[threadIdx.x] = s[n];
    }"""
    log, options = io.StringIO(), core.ProgramOptions(arch=gpu.arch, ptxas_options=["-v"])
    code = core.Program(text, "c++", options).compile("cubin", name_expressions=("spills",), logs=log)
    used = elf.resources(bytes(code.code))
    line = re.search(r"Used (\d+) registers.* (\d+) bytes cumulative stack size, (\d+) bytes smem", log.getvalue())
    assert line, log.getvalue()
    registers, stack, shared = map(int, line.groups())
    assert (used.registers, used.stack) == (registers, stack)
    assert used.shared - shared in (0, 1024)  # the system's own
    assert stack == 400
