"""Networks that know how they want to be fed."""

import pytest
import safetensors.torch
import timm
import torch

from replknet._errors import RunError, UsageError
from replknet.data import ImageFormat
from replknet.export.hub import save_model
from replknet.tasks.opened_model import describe_checkpoint, open_model

DESCRIPTION = {
    "model": "replknet_nano",
    "model_kwargs": {"small_kernel": 5},
    "num_classes": 3,
    "class_names": ["ant", "bee", "cat"],
    "image_size": 40,
    "mean": [0.1],
    "std": [0.2],
    "in_chans": 1,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """As `replknet train` writes it: raw weights, averaged weights, description."""
    torch.manual_seed(0)
    model = timm.create_model("replknet_nano", num_classes=3, in_chans=1, small_kernel=5)
    state = model.state_dict()
    averaged = {name: value + 1 if name == "head.bias" else value for name, value in state.items()}
    path = tmp_path_factory.mktemp("run") / "best.ckpt"
    content = {
        "state_dict": {f"model.{name}": value for name, value in state.items()},
        "model_ema": averaged,
        "replknet": DESCRIPTION,
    }
    torch.save(content, path)
    return path, state


def test_a_checkpoint_of_ours_needs_no_name(checkpoint):
    path, state = checkpoint
    opened = open_model(weights=path)
    assert opened.name == "replknet_nano"
    assert opened.image == ImageFormat(40, (0.1,), (0.2,), in_chans=1)
    assert opened.names() == ["ant", "bee", "cat"]
    assert opened.weights == "best.ckpt"
    assert not opened.model.training
    assert torch.equal(opened.model.state_dict()["head.bias"], state["head.bias"] + 1)
    raw = open_model(weights=path, use_ema=False)
    assert torch.equal(raw.model.state_dict()["head.bias"], state["head.bias"])


def test_options_win_over_the_checkpoint(checkpoint):
    opened = open_model(weights=checkpoint[0], image_size=64, mean=[0.5], crop_mode="center", crop_pct=0.9)
    assert opened.image == ImageFormat(64, (0.5,), (0.2,), in_chans=1, crop_mode="center", crop_pct=0.9)


def test_merged_gives_the_same_answers(checkpoint):
    x = torch.randn(2, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, merged = (
            open_model(weights=checkpoint[0]).model(x),
            open_model(weights=checkpoint[0], merged=True).model(x),
        )
    assert (plain - merged).abs().max() < 1e-4 * plain.abs().max()


def test_formats_of_named_models():
    ours = open_model("replknet_nano").image
    assert (ours.crop_mode, ours.size) == ("auto", 32)
    lite0 = open_model("tf_efficientnet_lite0")
    assert lite0.image.mean == (0.5, 0.5, 0.5)
    assert (lite0.image.crop_mode, lite0.image.crop_pct, lite0.image.interpolation) == ("center", 0.875, "bicubic")
    assert lite0.own_names is None
    assert lite0.names()[207] == "golden retriever"
    assert open_model("replknet_nano", num_classes=7).names() == [str(index) for index in range(7)]


def test_a_file_without_a_description_needs_a_name(tmp_path, checkpoint):
    torch.save(checkpoint[1], tmp_path / "plain.pth")
    safetensors.torch.save_file(checkpoint[1], tmp_path / "plain.safetensors")
    for name in ("plain.pth", "plain.safetensors"):
        assert describe_checkpoint(tmp_path / name) is None
        with pytest.raises(UsageError, match="does not tell its architecture"):
            open_model(weights=tmp_path / name)
        assert open_model("replknet_nano", weights=tmp_path / name, small_kernel=5).outputs == 3


def test_a_damaged_file_is_told_as_such_without_a_name_too(tmp_path, checkpoint):
    torch.save(checkpoint[1], tmp_path / "whole.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    with pytest.raises(RunError, match=r"half\.pth is damaged"):
        open_model(weights=tmp_path / "half.pth")


def test_wrong_requests_are_named(tmp_path):
    with pytest.raises(UsageError, match="no model was named"):
        open_model()
    with pytest.raises(UsageError, match=r"near names.*replknet_nano"):
        open_model("replknet_nanno")
    with pytest.raises(UsageError):
        open_model("replknet_nano", weights=tmp_path / "absent.pth")
    with pytest.raises(UsageError, match="no classifier"):
        open_model("replknet_nano", num_classes=0)
    (tmp_path / "corrupt.ckpt").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(RunError):
        open_model("replknet_nano", weights=tmp_path / "corrupt.ckpt")


@torch.no_grad()
def test_a_model_folder_comes_with_its_weights(tmp_path):
    torch.manual_seed(1)
    model = timm.create_model("replknet_nano", num_classes=3).eval()
    folder = save_model(model, tmp_path / "m", class_names=["ant", "bee", "cat"])
    opened = open_model(f"local-dir:{folder}")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(opened.model(x), model(x))
    assert (opened.weights, opened.own_names) == ("pretrained", ["ant", "bee", "cat"])
    fresh = open_model(f"local-dir:{folder}", pretrained=False)
    assert fresh.weights == "untrained"
    assert not torch.equal(fresh.model(x), model(x))
