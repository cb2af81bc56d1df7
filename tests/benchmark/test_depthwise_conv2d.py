import csv
import io

import pytest
import torch

from replknet._errors import UsageError
from replknet.benchmark import methods
from replknet.benchmark.depthwise_conv2d import Settings, floor_of, measure, taps_inside, to_csv
from replknet.benchmark.suites import NETWORKS, SUITES, Case, cases_of
from replknet.benchmark.timing import Roofline, Timed
from replknet.cli import main
from replknet.ops import depthwise_conv2d_reference

CPU = torch.device("cpu")
CASE = Case(2, 5, 6, 9, 3, 7, "test")


def settings(**changed):
    given = {
        "dtypes": (torch.float32,),
        "formats": ("contiguous",),
        "passes": methods.PASSES,
        "methods": ("replknet", "torch_contiguous", "fft"),
        "seconds": 0.001,
        "graph": True,
        "device": CPU,
    }
    return Settings(**(given | changed))


ROOFLINES = {dtype: Roofline(1e10, 1e12) for dtype in (torch.float32, torch.float16)}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("pass_", methods.PASSES)
@pytest.mark.parametrize("method", ["replknet", "replknet:torch", "torch_contiguous", "torch_channels_last", "fft"])
def test_every_method_computes_the_pass(method, pass_, channels_last):
    tensors = methods.draw(CASE, torch.float64, channels_last, CPU)
    got = methods.prepare(method, pass_, tensors)()
    x, weight = tensors.x.requires_grad_(), tensors.weight.requires_grad_()
    y = depthwise_conv2d_reference(x, weight)
    dx, dw = torch.autograd.grad(y, (x, weight), tensors.grad_y)
    exact = {"forward": y, "input_grad": dx, "weight_grad": dw}[pass_].detach()
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)
    assert methods.Oracle(CASE, tensors, pass_).error(got) < 1e-12


@pytest.mark.parametrize("pass_", methods.PASSES)
@pytest.mark.parametrize("damage", [float("nan"), 7.0])
def test_the_oracle_sees_damage(pass_, damage):
    tensors = methods.draw(CASE, torch.float64, False, CPU)
    got = methods.prepare("torch_contiguous", pass_, tensors)().clone()
    got.view(-1)[-1] = damage
    assert methods.Oracle(CASE, tensors, pass_).error(got) > 1e-3


def test_wrong_results_have_no_time(monkeypatch):
    right = methods.prepare("torch_contiguous", "forward", methods.draw(CASE, torch.float32, False, CPU))
    monkeypatch.setattr("replknet.benchmark.depthwise_conv2d.prepare", lambda *_: lambda: 1.1 * right())
    (row,) = measure([CASE], settings(passes=("forward",), methods=("fft",)), ROOFLINES)
    assert row.status == "wrong"
    assert row.median_us is row.p20_us is row.p80_us is None


def test_unwritten_results_are_wrong(monkeypatch):
    monkeypatch.setattr("replknet.benchmark.depthwise_conv2d.prepare", lambda *_: lambda: torch.empty(2, 5, 6, 9))
    (row,) = measure([CASE], settings(passes=("forward",), methods=("fft",)), ROOFLINES)
    assert (row.status, row.error) == ("wrong", float("inf"))


def test_rows_and_csv():
    rows = list(measure([CASE], settings(methods=("replknet", "cutlass_example_19", "replknet:cuda")), ROOFLINES))
    assert [row.status for row in rows] == ["ok", "cannot run", "cannot run"] * 3
    assert rows[0].p20_us <= rows[0].median_us <= rows[0].p80_us
    head, *lines = to_csv(rows, "a machine").splitlines()
    assert head == "# a machine"
    read = list(csv.DictReader(io.StringIO("\n".join(lines))))
    assert [row["pass_"] for row in read] == [pass_ for pass_ in methods.PASSES for _ in range(3)]
    assert read[1]["median_us"] == ""


def test_taps_inside_are_those_of_ones():
    for case in (CASE, Case(1, 1, 16, 16, 31, 31), Case(1, 1, 1, 1, 5, 5)):
        ones = torch.ones(1, 1, case.h, case.w, dtype=torch.float64), torch.ones(1, 1, case.kh, case.kw).double()
        assert taps_inside(case) == depthwise_conv2d_reference(*ones).sum().item()
    # As published: 256 of 961 taps count at R = 16, K = 31.
    assert taps_inside(Case(1, 1, 16, 16, 31, 31)) == 256 * 256


def test_floor_is_the_larger_of_bytes_and_operations():
    small, large = Case(1, 1, 64, 64, 1, 1), Case(1, 1, 64, 64, 63, 63)
    limits = Roofline(copy_bytes_per_second=1e9, matmul_flops_per_second=1e9)
    assert floor_of(small, torch.float32, "forward", limits) == ((2 * 4096 + 1) * 4 / 1e3, "bandwidth")
    assert floor_of(large, torch.float32, "forward", limits)[1] == "arithmetic"


def test_timing_orders_its_percentiles():
    times = Timed(lambda: torch.zeros(10), CPU).times(0.005)
    assert 0 < times.p20 <= times.median <= times.p80
    assert times.samples >= 3


def test_suites_are_those_of_the_papers():
    assert len(SUITES["paper"]()) == 24
    assert {case.h for case in SUITES["paper"]()} == {16, 32, 64}
    stages = cases_of(["replknet_31b"], ["224"], [64])
    assert [(case.c, case.h, case.kh) for case in stages if case.kh > 5] == [
        (128, 56, 31),
        (256, 28, 29),
        (512, 14, 27),
        (1024, 7, 13),
    ]
    odd = cases_of(["convnext_t"], ["cityscapes"], [1])
    assert [case.h for case in odd] == [193, 97, 49, 25]
    assert all(case.kh % 2 and case.kw % 2 for case in cases_of(["networks"], ["224", "384"], [1]))
    assert len({case.where.split()[0] for case in cases_of(["networks"], ["224"], [1])}) > len(NETWORKS) // 2


@pytest.mark.parametrize("suite", ["resnet", "1,2,3", "64,128,56x56,30x31", "0,1,2x2,3", "a,b,c,d"])
def test_wrong_suites_say_what_is_known(suite):
    with pytest.raises(UsageError):
        cases_of([suite], ["224"], [1])


def test_command_writes_csv_and_figure(tmp_path, capsys):
    out, figure = tmp_path / "op.csv", tmp_path / "op.png"
    options = ["--device", "cpu", "--seconds", "0.001", "--out", str(out), "--figure", str(figure)]
    assert main(["bench", "op", "1,4,8x6,5x3", *options]) == 0
    printed = capsys.readouterr().out
    assert "x floor" in printed
    assert "copy" in printed
    assert out.read_text().count("replknet") >= 6
    assert figure.read_bytes()[:4] == b"\x89PNG"


def test_command_explains(capsys):
    assert main(["bench", "op", "1,4,8x6,5x3", "--device", "cpu", "--explain", "true"]) == 0
    printed = capsys.readouterr().out
    for pass_ in methods.PASSES:
        assert f"{pass_}: torch (" in printed


@pytest.mark.parametrize(
    "options",
    [
        ["nothing"],
        ["--methods", "magic"],
        ["--dtypes", "int8"],
        ["--batch", "0"],
        ["--seconds", "0"],
        ["--threads", "0"],
    ],
)
def test_command_refuses_wrong_requests(options, capsys):
    assert main(["bench", "op", *options, "--device", "cpu"]) == 2
    assert capsys.readouterr().err
