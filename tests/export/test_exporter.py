"""Every format is written once, and read by another process that knows nothing but the runtime of the format."""

import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from replknet._errors import RunError, UsageError
from replknet.export import export_model, load_exported
from replknet.export.formats import SUFFIXES

READERS = {
    "onnx": """
        import onnxruntime
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        run = lambda x: session.run(None, {"images": x})[0]
        """,
    "torch-export": """
        import torch
        module = torch.export.load(path).module()
        run = lambda x: module(torch.from_numpy(x)).detach().numpy()
        """,
    "torchscript": """
        import torch
        module = torch.jit.load(path)
        run = lambda x: module(torch.from_numpy(x)).detach().numpy()
        """,
    "aotinductor": """
        import torch
        module = torch._inductor.aoti_load_package(path)
        run = lambda x: module(torch.from_numpy(x)).detach().numpy()
        """,
}
CODE = """
import sys
import numpy as np
path, images, target = sys.argv[1:]
{reader}
x = np.load(images)
assert "replknet" not in sys.modules
np.savez(target, all=run(x), one=run(x[:1]))
"""


def in_fresh_process(path: Path, images: torch.Tensor, kind: str, folder: Path) -> dict[str, np.ndarray]:
    np.save(folder / "images.npy", images.numpy())
    code = CODE.format(reader=textwrap.dedent(READERS[kind]))
    command = [sys.executable, "-c", code, str(path), str(folder / "images.npy"), str(folder / "out.npz")]
    subprocess.run(command, check=True, cwd=folder)
    return dict(np.load(folder / "out.npz"))


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("onnx", marks=pytest.mark.slow),
        "torch-export",
        "torchscript",
        pytest.param("aotinductor", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_a_fresh_process_gets_the_same_answers(model, pictures, tmp_path, kind):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = tmp_path / f"out/model{SUFFIXES[kind]}"
    report = export_model(model, path, pictures, format=kind, metadata={"model": "nano"})
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert report.max_difference <= 1e-4 * report.scale
    assert (report.images, report.agreement, report.bytes) == (8, 1.0, path.stat().st_size)
    got, want = in_fresh_process(path, pictures, kind, tmp_path), model(pictures).numpy()
    np.testing.assert_allclose(got["all"], want, rtol=0, atol=1e-4 * report.scale)
    np.testing.assert_allclose(got["one"], want[:1], rtol=0, atol=1e-4 * report.scale)
    exported = load_exported(path)
    assert (exported.format, exported.metadata["model"], exported.metadata["precision"]) == (kind, "nano", "fp32")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def onnx_files(model, pictures, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("onnx")
    reports = {
        precision: export_model(model, folder / f"{precision}.onnx", pictures, precision=precision, dynamic_size=True)
        for precision in ("fp32", "fp16", "int8-dynamic", "int8-static")
    }
    return folder, reports


@pytest.mark.slow
def test_onnx_graph_is_plain_and_open(model, onnx_files):
    import onnx

    graph = onnx.load(onnx_files[0] / "fp32.onnx").graph
    assert {node.domain for node in graph.node} == {""}
    kernels = [
        tuple(next(a.ints for a in node.attribute if a.name == "kernel_shape"))
        for node in graph.node
        if node.op_type == "Conv"
    ]
    assert kernels.count((13, 13)) == 2
    assert len(kernels) == 4 + 4 * 5 + 3 * 2, "stem, two pointwise and one depthwise a layer, two of its ConvFFN"
    assert not any(node.op_type == "BatchNormalization" for node in graph.node)
    dims = [dim.dim_param or dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim]
    assert (graph.input[0].name, dims) == ("images", ["batch", 3, "height", "width"])
    assert [output.name for output in graph.output] == ["output"]
    assert b"/work" not in graph.SerializeToString()
    assert b"site-packages" not in graph.SerializeToString()


@pytest.mark.slow
@torch.no_grad()
def test_onnx_runs_at_other_sizes(model, onnx_files):
    exported = load_exported(onnx_files[0] / "fp32.onnx")
    for shape in [(1, 3, 32, 32), (3, 3, 33, 47), (2, 3, 96, 64)]:
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        want = model(images)
        torch.testing.assert_close(exported(images), want, rtol=0, atol=1e-4 * float(want.abs().max()))


@pytest.mark.slow
def test_precisions_are_smaller_and_measured(onnx_files):
    reports = onnx_files[1]
    sizes = {precision: report.bytes for precision, report in reports.items()}
    assert sizes["fp16"] < 0.6 * sizes["fp32"]
    assert max(sizes["int8-dynamic"], sizes["int8-static"]) < 0.45 * sizes["fp32"]
    relative = {precision: report.max_difference / report.scale for precision, report in reports.items()}
    assert relative["fp32"] <= 1e-4 < relative["fp16"] <= 2e-2
    assert relative["fp32"] < relative["int8-dynamic"] < 0.5
    assert relative["fp32"] < relative["int8-static"] < 0.5
    assert reports["int8-static"].tolerance is None


@pytest.mark.parametrize("kind", ["torch-export", "torchscript"])
@torch.no_grad()
def test_open_sizes(model, pictures, tmp_path, kind):
    export_model(model, tmp_path / "m", pictures[:2], format=kind, dynamic_size=True, precision="fp32")
    exported = load_exported(tmp_path / "m", format=kind)
    images = torch.randn(1, 3, 40, 72, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(exported(images), model(images), rtol=1e-4, atol=1e-4)


def test_closed_dimensions_are_closed(model, pictures, tmp_path):
    export_model(model, tmp_path / "m.pt2", pictures[:2], format="torch-export", dynamic_batch=False)
    exported = load_exported(tmp_path / "m.pt2")
    exported(pictures[:1])
    with pytest.raises((RuntimeError, AssertionError)):
        exported(pictures[:2])


@torch.no_grad()
def test_feature_maps_become_several_outputs(pictures, tmp_path):
    torch.manual_seed(2)
    features: Any = timm.create_model("replknet_nano", features_only=True).eval()
    export_model(features, tmp_path / "f.pt2", pictures[:2], format="torch-export")
    got = load_exported(tmp_path / "f.pt2")(pictures[:3])
    want = features(pictures[:3])
    assert [tuple(a.shape) for a in got] == [tuple(b.shape) for b in want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


class Segmenter(nn.Module):
    """What a segmentation network does: a dictionary of maps of the size of the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.body(x)
        return {"out": nn.functional.interpolate(y, size=x.shape[2:], mode="bilinear"), "aux": y}


@pytest.mark.parametrize("kind", ["torch-export", "torchscript", pytest.param("onnx", marks=pytest.mark.slow)])
@torch.no_grad()
def test_segmentation_networks_with_labels(pictures, tmp_path, kind):
    torch.manual_seed(3)
    network = Segmenter().eval()
    report = export_model(network, tmp_path / "s", pictures, format=kind, labels=None, dynamic_size=True)
    got, aux = load_exported(tmp_path / "s", format=kind)(pictures)
    assert got.shape == (8, 5, 64, 64)
    torch.testing.assert_close(aux, network(pictures)["aux"], rtol=1e-4, atol=1e-4)
    assert report.agreement > 0.999


@torch.no_grad()
def test_accuracy_is_measured_on_labels(model, pictures, tmp_path):
    answers = model(pictures).argmax(1)
    labels = answers.clone()
    labels[0] = (labels[0] + 1) % 10
    report = export_model(model, tmp_path / "m.pt2", pictures, format="torch-export", labels=labels)
    assert report.model_accuracy == report.accuracy == 7 / 8


@pytest.mark.parametrize("kind", ["torch-export", "torchscript"])
def test_a_file_beyond_the_tolerance_is_not_kept(model, pictures, tmp_path, kind):
    path = tmp_path / "m"
    path.write_bytes(b"the former file")
    with pytest.raises(RunError, match=rf"{kind} in bf16 differs by .* from the model on 8 images; allowed is 1e-09"):
        export_model(model, path, pictures, format=kind, precision="bf16", tolerance=1e-9)
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
    assert path.read_bytes() == b"the former file"


def test_infinite_outputs_are_refused(tmp_path, pictures):
    network: Any = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 2)).eval()
    nn.init.constant_(network[1].bias, 1e6)
    with pytest.raises(RunError, match="infinite or undefined"):
        export_model(network, tmp_path / "m.pt2", pictures, format="torch-export", precision="fp16")
    assert list(tmp_path.iterdir()) == []


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_networks_that_cannot_be_followed_are_named(tmp_path, pictures):
    with pytest.raises(RunError, match=r"torch\.export cannot follow this model"):
        export_model(Branching().eval(), tmp_path / "m.pt2", pictures, format="torch-export")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "tflite"}, "unknown format 'tflite'; known: onnx"),
        ({"precision": "int4"}, "unknown precision 'int4'"),
        ({"format": "torchscript", "precision": "int8-static"}, "exists for --format onnx only"),
        ({"format": "onnx", "precision": "bf16"}, "use fp16"),
        ({"images": torch.zeros(1, 3, 8, 8)}, "at least two float32 pictures"),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "uint8"),
        ({"labels": torch.zeros(3)}, r"labels of shape \[3\]"),
    ],
)
def test_impossible_requests(model, pictures, tmp_path, changes, reason):
    images = changes.pop("images", pictures)
    with pytest.raises(UsageError, match=reason):
        export_model(model, tmp_path / "m", images, **changes)


def test_missing_packages_are_named(model, pictures, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(UsageError, match=r"needs onnxscript: pip install 'replknet\[export\]'"):
        export_model(model, tmp_path / "m.onnx", pictures)


@pytest.mark.parametrize("kind", list(SUFFIXES))
@pytest.mark.parametrize("content", [b"", b"not a model at all"], ids=["empty", "text"])
def test_damaged_files_are_named(tmp_path, kind, content):
    path = tmp_path / f"m{SUFFIXES[kind]}"
    path.write_bytes(content)
    with pytest.raises(RunError, match=rf"m{SUFFIXES[kind]} cannot be read as {kind}"):
        load_exported(path)


def test_files_of_unknown_kind_are_refused(tmp_path):
    (tmp_path / "m.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match="cannot tell its format"):
        load_exported(tmp_path / "m.bin")
    with pytest.raises(UsageError, match="no such file"):
        load_exported(tmp_path / "n.onnx")


def test_metadata_must_not_hide_the_precision(model, pictures, tmp_path):
    export_model(model, tmp_path / "m.pt2", pictures, format="torch-export", metadata={"precision": "x", "n": [1]})
    metadata = load_exported(tmp_path / "m.pt2").metadata
    assert json.dumps(metadata, sort_keys=True) == '{"n": [1], "precision": "fp32"}'
