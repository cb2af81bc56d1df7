import csv
from typing import Any

import pytest
import torch
from torch import nn

from replknet._errors import UsageError
from replknet.benchmark import model as benchmark
from replknet.benchmark.model import ModelSettings, measure_models
from replknet.cli import main


def settings(**changes) -> ModelSettings:
    usual = {
        "batches": (2,),
        "modes": ("inference", "training"),
        "executions": ("eager",),
        "convolutions": ("replknet", "torch"),
        "merged": (False, True),
        "dtypes": (torch.float32,),
        "channels_last": (False,),
        "device": torch.device("cpu"),
        "size": 32,
        "seconds": 0.01,
    }
    return ModelSettings(**{**usual, **changes})


def test_every_combination_is_measured_and_right():
    rows: list[Any] = list(measure_models(["replknet_nano"], settings()))
    found = [(row.mode, row.merged, row.convolution) for row in rows]
    inference = [("inference", merged, conv) for merged in (False, True) for conv in ("replknet", "torch")]
    assert found == [*inference, ("training", False, "replknet"), ("training", False, "torch")]
    for row in rows:
        assert row.status == "ok", row.note
        assert 0 < row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.images_per_second == pytest.approx(2000 / row.median_ms)
        assert row.error < 1e-4
        assert row.peak_mib is None


def test_networks_without_branches_are_not_measured_merged():
    rows = list(measure_models(["test_convnext"], settings(modes=("inference",))))
    assert [(row.merged, row.convolution, row.status) for row in rows] == [(False, "torch", "ok")]


def test_half_precision_and_channels_last():
    changes = {"dtypes": (torch.bfloat16,), "channels_last": (True,), "merged": (True,)}
    row: Any
    for row in measure_models(["replknet_nano"], settings(**changes)):
        assert (row.status, row.dtype, row.format) == ("ok", "bfloat16", "channels_last"), row.note
        assert 1e-4 < row.error < 0.4


def test_wrong_outputs_have_no_time(monkeypatch):
    def broken(model, *, fold_norms=True):
        nn.init.zeros_(model.head.weight)
        model.extra = nn.Identity()
        return model

    monkeypatch.setattr(benchmark, "reparameterize", broken)
    (row,) = measure_models(["replknet_nano"], settings(modes=("inference",), merged=(True,), convolutions=("torch",)))
    assert (row.status, row.median_ms) == ("wrong", None)


def test_a_failure_does_not_end_the_series(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no such kernel\nlong story")

    monkeypatch.setattr(benchmark, "_runner", fails)
    rows = list(measure_models(["replknet_nano"], settings(modes=("inference",))))
    assert [(row.status, row.note) for row in rows] == [("failed", "no such kernel")] * 4


def test_graphs_need_a_gpu():
    with pytest.raises(UsageError, match="CUDA graphs need a CUDA GPU"):
        list(measure_models(["replknet_nano"], settings(executions=("graph",))))


def test_command_writes_table_and_figure(tmp_path, capsys):
    out, figure = tmp_path / "m.csv", tmp_path / "m.svg"
    arguments = [
        "bench",
        "model",
        "replknet_nano",
        "test_resnet",
        "--batches",
        "[1,2]",
        "--size",
        "32",
        "--device",
        "cpu",
    ]
    arguments += ["--seconds", "0.01", "--merged", "[true,false]", "--out", str(out), "--figure", str(figure)]
    assert main(arguments) == 0
    lines = out.read_text().splitlines()
    assert "torch" in lines[0]
    rows = list(csv.DictReader(lines[1:]))
    assert [(row["model"], row["batch"], row["merged"]) for row in rows] == [
        ("replknet_nano", "1", "True"),
        ("replknet_nano", "1", "False"),
        ("replknet_nano", "2", "True"),
        ("replknet_nano", "2", "False"),
        ("test_resnet", "1", "False"),
        ("test_resnet", "2", "False"),
    ]
    assert {row["status"] for row in rows} == {"ok"}
    assert "test resnet" in figure.read_text()
    assert len(capsys.readouterr().out.splitlines()) == 7


@pytest.mark.parametrize(
    "arguments", [["nope"], ["replknet_nano", "--batches", "[0]"], ["replknet_nano", "--dtypes", "[float64]"]]
)
def test_impossible_requests_are_exit_code_2(arguments, capsys):
    assert main(["bench", "model", *arguments, "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("replknet: ")


@pytest.mark.gpu
@pytest.mark.parametrize("execution", ["eager", "compile", "graph"])
def test_gpu(cuda, execution):
    changes = {"executions": (execution,), "dtypes": (torch.float16,), "device": cuda, "seconds": 0.05}
    row: Any
    for row in measure_models(["replknet_nano"], settings(**changes)):
        assert row.status == "ok", (row, row.note)
        assert row.peak_mib > 0
