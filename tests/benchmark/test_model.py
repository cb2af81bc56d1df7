import csv
from dataclasses import fields, replace
from typing import Any

import pytest
import timm
import torch
from torch import nn

from replknet._errors import UsageError
from replknet.benchmark import model_runs
from replknet.benchmark.model import ModelSettings, measure_models
from replknet.benchmark.model_runs import FORMATS
from replknet.benchmark.model_suites import SUITES
from replknet.benchmark.timeline import by_category, category_of
from replknet.cli import main


def settings(**changes) -> ModelSettings:
    usual = {
        "batches": (2,),
        "modes": ("inference", "training"),
        "executions": ("eager",),
        "convolutions": ("replknet", "torch"),
        "merged": (False, True),
        "dtypes": (torch.float32,),
        "formats": ("contiguous",),
        "device": torch.device("cpu"),
        "size": (32, 32),
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
    assert [(row.merged, row.convolution, row.status) for row in rows] == [
        (False, "replknet", "ok"),
        (False, "torch", "ok"),
    ]


def test_networks_without_depthwise_convolutions_are_measured_with_torchs_alone():
    rows = list(measure_models(["test_vit"], settings(modes=("inference",), size=None)))
    assert [(row.convolution, row.status) for row in rows] == [("torch", "ok")]


def test_optimized_networks_in_every_format():
    changes = {"convolutions": ("optimize", "torch"), "formats": FORMATS, "merged": (True,)}
    rows: list[Any] = list(measure_models(["replknet_nano"], settings(**changes)))
    per_mode = [("optimize", form) for form in FORMATS] + [("torch", "contiguous"), ("torch", "channels_last")]
    assert [(row.convolution, row.format) for row in rows] == 2 * per_mode
    for row in rows:
        assert row.status == "ok", (row, row.note)
        assert (row.gradient_error is None) == (row.mode == "inference")
        assert (row.gradient_error or 0) < 1e-3


def test_feature_maps_and_receptive_fields():
    changes = {"modes": ("features", "erf"), "convolutions": ("optimize",), "size": (32, 64), "merged": (True,)}
    rows: list[Any] = list(measure_models(["replknet_nano"], settings(**changes)))
    assert [(row.mode, row.height, row.width, row.status) for row in rows] == [
        ("features", 32, 64, "ok"),
        ("erf", 32, 64, "ok"),
    ]
    assert rows[0].error < 1e-4
    assert rows[1].gradient_error < 1e-4


def test_checkpointing_changes_no_gradient():
    changes = {"modes": ("training",), "convolutions": ("replknet",), "checkpointing": (False, True)}
    rows: list[Any] = list(measure_models(["replknet_nano"], settings(**changes)))
    assert [(row.checkpointing, row.status) for row in rows] == [(False, "ok"), (True, "ok")]
    assert rows[1].gradient_error < 1e-3


def test_onnx_runtime_runs_the_same_graph():
    changes = {"executions": ("eager", "onnxruntime"), "merged": (True,), "convolutions": ("torch",)}
    rows: list[Any] = list(measure_models(["replknet_nano"], settings(**changes)))
    assert [(row.mode, row.execution, row.status) for row in rows] == [
        ("inference", "eager", "ok"),
        ("inference", "onnxruntime", "ok"),
        ("training", "eager", "ok"),
        ("training", "onnxruntime", "failed"),
    ]
    assert rows[1].error < 1e-4
    assert "measured for inference in float32" in rows[3].note


def test_timeline_accounts_for_the_time():
    (row,) = measure_models(
        ["replknet_nano"], settings(modes=("inference",), merged=(True,), convolutions=("torch",), timeline=True)
    )
    parts = {category: milliseconds for category, milliseconds, _ in by_category(row.timeline)}
    assert {"convolution", "between kernels"} <= parts.keys()
    assert all(part.milliseconds > 0 for part in row.timeline)
    assert sum(parts.values()) == pytest.approx(sum(part.milliseconds for part in row.timeline))


@pytest.mark.parametrize(
    ("kernel", "category"),
    [
        ("void forward_nhwc<__half, 31>", "depthwise"),
        ("triton_tem_fused_addmm_relu_3", "matrix product"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "matrix product"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16", "convolution"),
        ("triton_red_fused__native_batch_norm_legit_functional_12", "norm and reduction"),
        ("triton_poi_fused_gelu_4", "pointwise"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("aten::native_batch_norm_backward", "norm and reduction"),
        ("replknet::depthwise_conv2d", "depthwise"),
        ("something_else", "other"),
    ],
)
def test_categories(kernel, category):
    assert category_of(kernel) == category


def test_half_precision_and_channels_last():
    changes = {"dtypes": (torch.bfloat16,), "formats": ("channels_last",), "merged": (True,)}
    row: Any
    for row in measure_models(["replknet_nano"], settings(**changes)):
        assert (row.status, row.dtype, row.format) == ("ok", "bfloat16", "channels_last"), row.note
        assert 1e-4 < row.error < 0.4


def test_wrong_outputs_have_no_time(monkeypatch):
    def broken(model, *, fold_norms=True):
        nn.init.zeros_(model.head.weight)
        return model

    monkeypatch.setattr(model_runs, "reparameterize", broken)
    (row,) = measure_models(["replknet_nano"], settings(modes=("inference",), merged=(True,), convolutions=("torch",)))
    assert (row.status, row.median_ms) == ("wrong", None)


def test_a_failure_does_not_end_the_series(monkeypatch):
    def fails(network, how):
        if how.convolution == "torch" and not how.merged:
            return network
        raise RuntimeError("no such kernel\nlong story")

    monkeypatch.setattr(model_runs, "_prepared", fails)
    rows = list(measure_models(["replknet_nano"], settings(modes=("inference",))))
    failed = ("failed", "no such kernel")
    assert [(row.status, row.note) for row in rows] == [failed, ("ok", ""), failed, failed]


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


def test_suites_and_what_overrides_them(tmp_path, monkeypatch):
    monkeypatch.setitem(SUITES, "cpu", [replace(entry, models=("replknet_nano",)) for entry in SUITES["cpu"]])
    out, lines = tmp_path / "m.csv", tmp_path / "t.csv"
    arguments = ["--suites", "[cpu]", "--device", "cpu", "--size", "32", "--batches", "[2]", "--seconds", "0.01"]
    assert main(["bench", "model", *arguments, "--out", str(out), "--timeline", str(lines)]) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()[1:]))
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["batch"] for row in rows} == {"2"}
    assert [(row["convolution"], row["dtype"]) for row in rows if row["mode"] == "training"] == [
        ("torch", "float32"),
        ("optimize", "float32"),
        ("optimize", "bfloat16"),
    ]
    assert "onnxruntime" in {row["execution"] for row in rows}
    assert {part["category"] for part in csv.DictReader(lines.read_text().splitlines()[1:])} > {"convolution"}


@pytest.mark.parametrize("suite", SUITES)
def test_suites_name_what_exists(suite):
    for entry in SUITES[suite]:
        assert all(timm.is_model(name) for name in entry.models)
        assert entry.options.keys() <= {field.name for field in fields(ModelSettings)}


@pytest.mark.parametrize(
    "arguments",
    [
        ["nope"],
        ["replknet_nano", "--batches", "[0]"],
        ["replknet_nano", "--dtypes", "[float64]"],
        ["--suites", "[nope]"],
        ["replknet_nano", "--suites", "[cpu]"],
        ["replknet_nano", "--size", "0"],
        ["replknet_nano", "--executions", "[compile_graph]"],
    ],
)
def test_impossible_requests_are_exit_code_2(arguments, capsys):
    assert main(["bench", "model", *arguments, "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("replknet: ")


@pytest.mark.gpu
@pytest.mark.parametrize("execution", ["eager", "compile", "graph", "compile_graph"])
@pytest.mark.parametrize("form", FORMATS)
def test_gpu(cuda, execution, form):
    changes = {"executions": (execution,), "dtypes": (torch.float16,), "device": cuda, "seconds": 0.05}
    changes |= {"convolutions": ("optimize",), "formats": (form,)}
    row: Any
    for row in measure_models(["replknet_nano"], settings(**changes)):
        assert row.status == "ok", (row, row.note)
        assert row.peak_mib > 0


def test_a_network_that_cannot_run_at_all_is_a_row_too():
    rows = list(
        measure_models(["test_resnet", "replknet_nano"], settings(modes=("training",), batches=(1,), size=(32, 32)))
    )
    assert rows[0].status == "failed"
    assert "more than 1 value per channel" in rows[0].note
