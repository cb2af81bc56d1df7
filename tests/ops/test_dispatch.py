import pytest
import torch

from replknet.ops import BACKENDS, cuda, depthwise_conv2d, explain
from replknet.ops._dispatch import _default_with_kernels, can_run, choose, implementation
from replknet.ops._problem import PASSES, Problem
from replknet.ops.cuda._launch import Gpu

CPU = torch.device("cpu")


def problem(n, c, h, w, kh, kw, *, dtype=torch.float32, channels_last=False, device=CPU):
    return Problem((n, c, h, w), (kh, kw), dtype, channels_last, device)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("pass_", PASSES)
def test_a_backend_asked_for_runs_or_says_why(backend, pass_):
    given = problem(2, 8, 9, 9, 5, 5)
    reason = can_run(backend, pass_, given)
    if reason is None:
        assert choose(pass_, given, backend).reason == "asked for by name"
        assert callable(getattr(implementation(backend), pass_))
    else:
        with pytest.raises(
            NotImplementedError, match=r"x \[2, 8, 9, 9\] contiguous float32 on cpu, kernel 5x5"
        ) as info:
            choose(pass_, given, backend)
        assert reason in str(info.value)


def test_unknown_dtypes_have_a_reason():
    assert "int32" in (can_run("torch", "forward", problem(1, 1, 4, 4, 3, 3, dtype=torch.int32)) or "")


def test_explain_says_backend_and_reason_of_each_pass():
    x, w = torch.empty(8, 128, 56, 56, device="meta"), torch.empty(128, 1, 31, 31, device="meta")
    lines = str(explain(x, w)).splitlines()
    assert [line.split(":")[0] for line in lines] == list(PASSES)
    assert all("(" in line for line in lines)


def test_explain_refuses_what_the_operator_refuses():
    x, w = torch.zeros(1, 2, 4, 4), torch.zeros(2, 1, 4, 4)
    for call in (explain, depthwise_conv2d):
        with pytest.raises(ValueError, match="4x4 is even"):
            call(x, w)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_large_kernels_on_a_gpu_run_our_kernels(cuda, dtype, channels_last):
    given = problem(64, 128, 56, 56, 31, 31, dtype=dtype, channels_last=channels_last, device=torch.device("cuda", 0))
    assert [choose(pass_, given).backend for pass_ in PASSES] == ["cuda"] * 3


@pytest.mark.parametrize(
    ("dtype", "channels_last", "shared_bytes", "copies"),
    [
        (torch.float16, True, 232448, False),
        (torch.float32, True, 232448, False),
        # No channels_last tile fits.
        (torch.float16, True, 10000, True),
        (torch.float32, True, 10000, True),
        (torch.float32, False, 10000, False),
    ],
)
def test_contiguous_copies_are_said(monkeypatch, dtype, channels_last, shared_bytes, copies):
    monkeypatch.setattr(cuda, "gpu_of", lambda index: Gpu("sm_90", 132, shared_bytes))
    given = problem(8, 128, 56, 56, 31, 31, dtype=dtype, channels_last=channels_last, device=torch.device("cuda", 0))
    choice = _default_with_kernels("forward", given)
    assert choice.backend == "cuda"
    assert ("contiguous copies" in choice.reason) == copies


@pytest.mark.parametrize(("n", "backend"), [(1, "torch"), (64, "cuda")])
def test_one_small_contiguous_map_is_torchs(n, backend):
    given = problem(n, 1024, 7, 7, 13, 13, dtype=torch.float16, device=torch.device("cuda", 0))
    assert _default_with_kernels("forward", given).backend == backend
    assert _default_with_kernels("input_grad", given).backend == "cuda"
