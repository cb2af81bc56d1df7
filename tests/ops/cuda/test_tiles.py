"""The tiles that tuning measures: they fit the GPU, are named, compile, and on a GPU give right results."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from replknet.ops import cuda
from replknet.ops._problem import Problem
from replknet.ops.cuda import _plan, _plan_channels_last
from replknet.ops.cuda._launch import Gpu
from replknet.ops.cuda._plan import Shape

A100, L4 = Gpu("sm_80", 108, 166912), Gpu("sm_89", 58, 101376)
H100 = Gpu("sm_90a", 132, 232448, clusters=True)
PASSES = {
    "forward": (_plan.forward_tiles, _plan.forward_plan),
    "weight_grad": (_plan.weight_grad_tiles, _plan.weight_grad_plan),
    "forward, channels_last": (_plan_channels_last.forward_tiles, _plan_channels_last.forward_plan),
    "weight_grad, channels_last": (_plan_channels_last.weight_grad_tiles, _plan_channels_last.weight_grad_plan),
}
TYPES = [(torch.float16, 1), (torch.bfloat16, 1), (torch.float32, 2), (torch.float32, 3)]
ODD = st.integers(0, 31).map(lambda i: 2 * i + 1)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(PASSES)), st.sampled_from([A100, L4, H100]), st.sampled_from(TYPES),
    st.integers(1, 130), st.integers(1, 300), st.integers(1, 200), st.integers(1, 200), ODD, ODD,
)  # fmt: skip
def test_every_tile_fits_and_has_a_name_of_its_own(which, gpu, kind, n, c, h, w, kh, kw):
    offer, plan_of = PASSES[which]
    shape = Shape(n, c, h, w, kh, kw, *kind, 2)
    try:
        default = plan_of(shape, gpu)
        tiles = offer(shape, gpu)
    except NotImplementedError:
        assume(False)
        raise
    assert 1 <= len(tiles) <= _plan.MOST_TILES
    assert plan_of(shape, gpu, tiles[0]) == default
    assert len({str(tile) for tile in tiles}) == len(tiles)
    for tile in tiles:
        launch = plan_of(shape, gpu, tile).launch
        assert tile.blocks * (launch.shared_bytes + 1024) <= gpu.shared_bytes + 1024
        assert launch.block <= 1024
        assert tile.blocks * launch.block <= 1536
        assert min(launch.grid) >= 1
        assert max(launch.grid[1:]) <= 65535


def test_the_alignment_of_a_tensor_does_not_change_the_tiles():
    for offer, _ in PASSES.values():
        offers = {offer(Shape(64, 128, 56, 56, 31, 31, torch.float16, 1, align), H100) for align in (2, 4, 8, 16)}
        assert len(offers) == 1


@pytest.fixture
def h100(monkeypatch):
    """Plans for an H100, without one."""
    caches = (cuda._forward_plan, cuda._weight_grad_plan, cuda._forward_plan_channels_last)
    monkeypatch.setattr(cuda, "gpu_of", lambda index: H100)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_a_name_chooses_its_tile_and_another_shapes_name_the_default(h100):
    shape = Shape(64, 128, 56, 56, 31, 31, torch.float16, 1, 16)
    names = [str(tile) for tile in _plan.forward_tiles(shape, H100)]
    assert names[0].startswith("images=16 tiles=2 groups=1 ")
    plans = [cuda._forward_plan(shape, 0, name) for name in names]
    assert len({plan.launch for plan in plans}) > 4
    assert plans == [_plan.forward_plan(shape, H100, tile) for tile in _plan.forward_tiles(shape, H100)]
    for other in (None, "images=3", "", names[1] + " "):
        assert cuda._forward_plan(shape, 0, other) == plans[0]


def test_names_are_those_of_the_format_and_the_pass(h100):
    def names(pass_, channels_last):
        device = torch.device("cuda", 0)
        return cuda.tiles(pass_, Problem((64, 128, 56, 56), (31, 31), torch.float16, channels_last, device))

    assert all("warps=" in name and "tiles=" in name for name in names("forward", False))
    assert all("pairs=" in name and "slices=" in name for name in names("weight_grad", False))
    assert all(name.startswith("columns=") and "storers=" in name for name in names("forward", True))
    assert all(name.startswith("columns=") and "x_slots=" in name for name in names("weight_grad", True))
    assert names("forward", False) == names("input_grad", False)


def test_where_no_tile_fits_none_is_offered(monkeypatch):
    monkeypatch.setattr(cuda, "gpu_of", lambda index: Gpu("sm_x", 10, 20000))
    for channels_last in (False, True):
        given = Problem((1, 8, 200, 320), (63, 63), torch.float16, channels_last, torch.device("cuda", 0))
        assert cuda.tiles("forward", given) == ()


@pytest.mark.slow
def test_tiles_compile_and_spill_little(elf):
    pytest.importorskip("cuda.core", reason="needs cuda-core, NVRTC's front end")
    from replknet.ops.cuda._compile import _nvrtc, source

    jobs = []
    for gpu in (A100, H100):
        for n, c, size, k, *kind in ((64, 128, 56, 31, torch.float16, 1), (16, 96, 14, 13, torch.float32, 3)):
            shape = Shape(n, c, size, size, k, k, *kind, 16)
            for offer, plan_of in PASSES.values():
                jobs += [(plan_of(shape, gpu, tile).launch, gpu, tile) for tile in offer(shape, gpu)]
    jobs = list({(launch.expression, gpu.arch): (launch, gpu, tile) for launch, gpu, tile in jobs}.values())

    def used(job):
        launch, gpu, _ = job
        return elf.resources(_nvrtc(source(launch.sources), launch.expression, gpu.arch).cubin)

    with ThreadPoolExecutor(2) as pool:
        for (launch, gpu, tile), found in zip(jobs, pool.map(used, jobs), strict=True):
            assert found.stack <= 104, (launch.expression, gpu.arch)
            a_warp = -(-found.registers // 8) * 8 * 32
            assert a_warp * tile.blocks * launch.block // 32 <= 65536, (launch.expression, gpu.arch)


TUNE = """
import torch, replknet
from replknet.ops import _tuning
torch.backends.cudnn.allow_tf32 = False
if {reading}:
    _tuning.measure_problem = None
for layout in (torch.contiguous_format, torch.channels_last):
    torch.manual_seed(0)
    x = torch.randn(8, 32, 20, 20, device="cuda", dtype=torch.float16).to(memory_format=layout).requires_grad_()
    w = torch.randn(32, 1, 13, 13, device="cuda", dtype=torch.float16, requires_grad=True)
    with replknet.ops.autotune():
        y = replknet.ops.depthwise_conv2d(x, w)
        y.backward(torch.ones_like(y))
    got = [value.detach().double().cpu() for value in (y, x.grad, w.grad)]
    x64, w64 = (value.detach().double().cpu().contiguous().requires_grad_() for value in (x, w))
    exact = replknet.ops.depthwise_conv2d_fft(x64, w64)
    exact.backward(torch.ones_like(exact))
    for value, right in zip(got, (exact.detach(), x64.grad, w64.grad)):
        assert (value - right).abs().max() <= 1e-3 * right.abs().max()
    told = str(replknet.ops.explain(x, w))
    assert told.count("measured: ") == 3, told
    print(told)
"""


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_tuning_on_a_gpu_gives_right_results_that_the_next_process_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLKNET_CACHE", str(tmp_path))
    told = [
        subprocess.run([sys.executable, "-c", TUNE.format(reading=reading)], check=True, capture_output=True, text=True)
        for reading in (False, True)
    ]
    entries = [path.read_text() for path in (tmp_path / "tuning").glob("*.json")]
    assert len(entries) == 6
    assert all('"cuda images=' in entry or '"cuda columns=' in entry for entry in entries)
    assert told[0].stdout == told[1].stdout
    assert "cannot be tuned" not in told[0].stderr
