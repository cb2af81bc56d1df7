import io
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import timm
import torch

from replknet._errors import RunError, UsageError
from replknet.cli import main
from replknet.models import load_checkpoint
from replknet.models.convert import convert_checkpoint, network_of


def trained_like(name: str = "replknet_nano", **kwargs) -> Any:
    """A network whose every tensor is random, norms included."""
    torch.manual_seed(3)
    model = timm.create_model(name, **kwargs).eval()
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2.0)
        elif value.is_floating_point() and value.ndim == 1:
            value.normal_().mul_(0.3).add_(0.7 if key.endswith("weight") else 0.0)
        elif key.endswith("num_batches_tracked"):
            value.fill_(1234)
    return model


@pytest.fixture(scope="module")
def model():
    return trained_like()


@pytest.fixture
def official(model, tmp_path) -> Path:
    torch.save(model.state_dict(), tmp_path / "official.pth")
    return tmp_path / "official.pth"


def load(path: Path) -> dict:
    return safetensors.torch.load_file(path) if path.suffix == ".safetensors" else torch.load(path)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "way",
    [
        [("timm", "a.safetensors")],
        [("mmpretrain", "a.pth")],
        [("mmpretrain", "a.safetensors")],
        [("timm", "a.safetensors"), ("mmpretrain", "b.pth"), ("timm", "c.pth"), ("mmpretrain", "d.safetensors")],
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["train", "merged"])
def test_round_trips_are_exact(model, official, tmp_path, way, form):
    start = tmp_path / "start.pth"
    convert_checkpoint(official, start, form=form)
    current = start
    for layout, name in way:
        report = convert_checkpoint(current, tmp_path / name, layout=layout)
        assert report.exact
        assert report.dropped == ()
        current = tmp_path / name
    back = tmp_path / "back.pth"
    assert convert_checkpoint(current, back).network == "replknet_nano"
    assert same(load(start), load(back))
    if form == "train":
        assert same(load(back), model.state_dict())


def test_mmpretrain_names(official, tmp_path):
    report = convert_checkpoint(official, tmp_path / "mm.pth", layout="mmpretrain")
    names = torch.load(tmp_path / "mm.pth")["state_dict"].keys()
    assert {"backbone.stem.0.conv.weight", "backbone.stages.3.norm.weight", "head.fc.bias"} <= names
    assert all(name.startswith(("backbone.", "head.fc.")) for name in names)
    assert report.renamed == report.keys == len(names)


@pytest.mark.parametrize(("form", "layout"), [("merged", "official"), ("merged", "mmpretrain"), ("fused", "timm")])
def test_merging_keeps_the_function(model, official, tmp_path, form, layout):
    report = convert_checkpoint(official, tmp_path / "out.pth", form=form, layout=layout)
    assert report.form == ("train", form)
    assert not report.exact
    assert report.max_difference is not None
    assert report.max_difference < 1e-5
    fresh: Any = timm.create_model("replknet_nano", form=form).eval()
    assert load_checkpoint(fresh, tmp_path / "out.pth").is_exact
    images = torch.rand(2, 3, 48, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(fresh(images), model(images), rtol=1e-5, atol=1e-5)


def test_other_architectures_are_read_from_the_shapes(tmp_path):
    kwargs = {"small_kernel": None, "dw_ratio": 1.5, "ffn_ratio": 3.0, "in_chans": 1, "num_classes": 0}
    model = trained_like(norm_features=[1, 3], layers=(1, 2, 1, 1), **kwargs)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    report = convert_checkpoint(tmp_path / "a.pth", tmp_path / "b.pth", form="merged")
    assert "layers=(1, 2, 1, 1)" in report.network
    images = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model.forward_features(images)
        stride2 = network_of(torch.load(tmp_path / "b.pth"))
        stride2.stem[0].conv.stride, stride2.stem[3].conv.stride = (model.stem[i].conv.stride for i in (0, 3))
        torch.testing.assert_close(stride2.forward_features(images), want, rtol=1e-5, atol=1e-5)


def test_wrappers_ema_and_22k_heads_are_taken_off(model, tmp_path):
    ema = {f"module.{k}": v + 1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save({"model": model.state_dict(), "model_ema": ema, "epoch": 3}, tmp_path / "a.pth")
    report = convert_checkpoint(tmp_path / "a.pth", tmp_path / "b.pth")
    assert report.unwrapped == ("model_ema", "module.")
    assert torch.equal(load(tmp_path / "b.pth")["norm.bias"], model.state_dict()["norm.bias"] + 1)
    convert_checkpoint(tmp_path / "a.pth", tmp_path / "c.pth", use_ema=False)
    assert same(load(tmp_path / "c.pth"), model.state_dict())
    state = {k.replace("head.", "head.cls_22k."): v for k, v in model.state_dict().items()}
    torch.save(state, tmp_path / "d.pth")
    assert convert_checkpoint(tmp_path / "d.pth", tmp_path / "e.pth").renamed == 2
    assert same(load(tmp_path / "e.pth"), model.state_dict())


def test_backbone_of_a_segmentation_checkpoint(model, tmp_path):
    state = {f"backbone.{k}": v for k, v in model.state_dict().items() if not k.startswith("head.")}
    torch.save({"state_dict": {**state, "decode_head.conv_seg.weight": torch.ones(2)}}, tmp_path / "seg.pth")
    with pytest.raises(RunError, match=r"decode_head\.conv_seg\.weight"):
        convert_checkpoint(tmp_path / "seg.pth", tmp_path / "out.pth", layout="mmpretrain")
    report = convert_checkpoint(tmp_path / "seg.pth", tmp_path / "out.pth", backbone_only=True)
    assert report.dropped == ("decode_head.conv_seg.weight",)
    assert "head.weight" not in load(tmp_path / "out.pth")


def test_half_precision_and_shared_memory_survive(model, tmp_path):
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    state["head.weight"] = torch.cat([state["head.weight"]] * 2)[: len(state["head.weight"])]
    torch.save(state, tmp_path / "a.pth")
    convert_checkpoint(tmp_path / "a.pth", tmp_path / "b.safetensors", layout="timm")
    assert same(load(tmp_path / "b.safetensors"), state)
    convert_checkpoint(tmp_path / "a.pth", tmp_path / "c.pth", form="merged")
    assert {v.dtype for v in load(tmp_path / "c.pth").values()} == {torch.float16, torch.int64}
    with safetensors.safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_other_networks_change_container_only(tmp_path):
    state = timm.create_model("resnet18", num_classes=2).state_dict()
    torch.save({"state_dict": state}, tmp_path / "r.pth")
    report = convert_checkpoint(tmp_path / "r.pth", tmp_path / "r.safetensors", layout="timm")
    assert (report.network, report.exact, report.form) == ("not a RepLKNet", True, (None, None))
    assert same(load(tmp_path / "r.safetensors"), state)
    with pytest.raises(RunError, match="nothing to bring into the merged form"):
        convert_checkpoint(tmp_path / "r.pth", tmp_path / "x.pth", form="merged")


def test_there_is_no_way_back(official, tmp_path):
    convert_checkpoint(official, tmp_path / "m.pth", form="merged")
    with pytest.raises(UsageError, match="one way"):
        convert_checkpoint(tmp_path / "m.pth", tmp_path / "t.pth", form="train")
    with pytest.raises(UsageError, match="fused form has no official layout"):
        convert_checkpoint(official, tmp_path / "f.pth", form="fused")
    convert_checkpoint(official, tmp_path / "f.safetensors", form="fused", layout="timm")
    for layout in ("official", "mmpretrain"):
        with pytest.raises(UsageError, match=f"fused form, which has no {layout} layout"):
            convert_checkpoint(tmp_path / "f.safetensors", tmp_path / "x.pth", layout=layout)
    assert not (tmp_path / "x.pth").exists()


def test_everyone_may_read_what_is_written(official, tmp_path):
    for target in ("a.pth", "a.safetensors"):
        convert_checkpoint(official, tmp_path / target)
    (tmp_path / "usual").write_text("")
    assert {oct(path.stat().st_mode) for path in tmp_path.glob("[au]*")} == {oct((tmp_path / "usual").stat().st_mode)}


def test_an_incomplete_network_is_named(model, tmp_path):
    state = dict(model.state_dict())
    del state["stages.0.blocks.0.pw2.bn.weight"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(RunError, match=r"1 tensors missing \['stages\.0\.blocks\.0\.pw2\.bn\.weight'\]"):
        convert_checkpoint(tmp_path / "a.pth", tmp_path / "b.pth", form="merged")


def pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": Path("x")}, buffer)
    return buffer.getvalue()


DAMAGED = {"empty": b"", "page": b"<html>", "zip": b"PK\x03\x04 broken", "code": pickled()}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_sources_leave_nothing_behind(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(RunError, match=r"a\.pth"):
        convert_checkpoint(tmp_path / "a.pth", tmp_path / "out.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_existing_targets_are_kept(official, tmp_path):
    (tmp_path / "out.pth").write_bytes(b"precious")
    with pytest.raises(UsageError, match="exists"):
        convert_checkpoint(official, tmp_path / "out.pth")
    with pytest.raises(UsageError, match="same file"):
        convert_checkpoint(official, official, overwrite=True)
    assert (tmp_path / "out.pth").read_bytes() == b"precious"
    convert_checkpoint(official, tmp_path / "out.pth", overwrite=True)
    assert same(load(tmp_path / "out.pth"), load(official))


def test_command(official, tmp_path, capsys):
    target = tmp_path / "new" / "w.safetensors"
    assert main(["convert", str(official), str(target), "--layout", "timm", "--form", "fused"]) == 0
    out = capsys.readouterr().out
    assert "replknet_nano" in out
    assert "train form to fused form" in out
    assert main(["convert", str(target), str(tmp_path / "x.pth"), "--form", "train"]) == 2
    assert main(["convert", str(tmp_path / "none.pth"), str(tmp_path / "x.pth")]) == 2
    assert "none.pth" in capsys.readouterr().err
