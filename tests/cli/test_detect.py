"""`replknet detect`: exit codes, one line an error, nothing half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="needs pip install 'replknet[detection]'")

import torch
from PIL import Image

from replknet.cli import main
from replknet.tasks.detection.detector import build_detector
from replknet.tasks.openmmlab.configs import read_config

RECIPE = Path(__file__).parents[2] / "recipes" / "detection" / "replknet_nano_fcos.py"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two grey pictures with a square each."""
    images, annotations = [], []
    for number in (1, 2):
        Image.new("RGB", (96, 64), (40 * number, 90, 120)).save(tmp_path / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 96, "height": 64})
        box = [10 * number, 10, 30, 30]
        annotations.append({"id": number, "image_id": number, "category_id": 7, "bbox": box})
    dataset = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "square"}]}
    (tmp_path / "all.json").write_text(json.dumps(dataset))
    return tmp_path


@pytest.fixture
def weights(tmp_path) -> Path:
    """An untrained checkpoint of MMDetection 2.x's kind, without its config."""
    torch.manual_seed(0)
    path = tmp_path / "old.pth"
    torch.save({"state_dict": build_detector(read_config(RECIPE)).state_dict()}, path)
    return path


def failed(capsys, code: int, *words: str, argv: list[str]) -> None:
    assert main(["detect", *map(str, argv)]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("replknet: ")]
    for word in words:
        assert word in lines[-1]


def training(folder: Path, output: str = "run") -> list[str]:
    data = ["--train_annotations", folder / "all.json", "--train_images", folder, "--output", folder / output]
    return ["train", "--config", RECIPE, *data, "--device", "cpu", "--workers", "0"]


def test_train_eval_predict_convert(folder, capsys):
    scored = ["--val_annotations", str(folder / "all.json"), "--val_images", str(folder)]
    small = ["--epochs", "1", "--batch_size", "2", "--image_size", "64", "--warmup", "1"]
    assert main(["detect", *map(str, training(folder)), *scored, *small]) == 0
    run = folder / "run"
    assert {"epoch_1.pth", "last_checkpoint"} <= set(os.listdir(run))
    checkpoint = str(run / "epoch_1.pth")
    hardware = ["--device", "cpu"]
    logs = ["--log_folder", str(folder / "logs"), "--workers", "0"]
    result = str(folder / "scores.json")
    assert main(["detect", "eval", "--weights", checkpoint, *scored, *hardware, *logs, "--output", result]) == 0
    assert {"bbox_AP", "bbox_AP50"} <= json.loads(Path(result).read_text()).keys()
    out = folder / "found"
    words = ["--weights", checkpoint, "--output", str(out), "--score_threshold", "0", *hardware]
    assert main(["detect", "predict", str(folder / "1.png"), *words]) == 0
    assert set(os.listdir(out)) == {"1.png", "predictions.json"}
    found = json.loads((out / "predictions.json").read_text())
    assert found["categories"] == [{"id": 7, "name": "square"}]
    merged = str(folder / "merged.pth")
    assert main(["detect", "convert", checkpoint, merged, "--merged", "true"]) == 0
    assert "1 classes, merged form" in capsys.readouterr().out
    words[1] = merged
    assert main(["detect", "predict", str(folder / "1.png"), *words]) == 0
    again = json.loads((out / "predictions.json").read_text())
    assert again["categories"] == found["categories"]
    scores = [[a["score"] for a in result["annotations"]] for result in (found, again)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    failed(capsys, 2, "exists; choose another name", argv=["convert", checkpoint, merged])


def test_old_checkpoints_need_their_config_once(folder, weights, capsys):
    target = folder / "new.pth"
    failed(capsys, 2, "does not hold its config", argv=["convert", weights, target])
    failed(capsys, 1, "1 classes were named", argv=["convert", weights, target, "--config", RECIPE, "--classes", "[a]"])
    assert not target.exists()
    assert not list(folder.glob(".*.tmp"))
    assert main(["detect", "convert", str(weights), str(target), "--config", str(RECIPE)]) == 0
    words = ["--weights", str(target), "--device", "cpu", "--image_size", "64", "--output", str(folder / "o")]
    assert main(["detect", "predict", str(folder / "1.png"), *words]) == 0
    assert "80 classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (lambda d: "{", 1, ["all.json is not JSON"]),
        (lambda d: {**d, "categories": []}, 1, ["lists no categories"]),
        (lambda d: {**d, "annotations": [{**d["annotations"][0], "category_id": 8}]}, 1, ["no category", "8"]),
        (lambda d: {**d, "images": [{**d["images"][0], "file_name": "gone.png"}, d["images"][1]]}, 2, ["gone.png"]),
        (lambda d: {**d, "images": [{**d["images"][0], "width": 95}, d["images"][1]]}, 1, ["96x64", "95x64"]),
        (lambda d: {**d, "annotations": []}, 2, ["has no boxes"]),
    ],
)
def test_data_that_cannot_be_used(folder, capsys, spoil, code, words):
    spoiled = spoil(json.loads((folder / "all.json").read_text()))
    (folder / "all.json").write_text(spoiled if isinstance(spoiled, str) else json.dumps(spoiled))
    failed(capsys, code, *words, argv=training(folder))
    assert not (folder / "run").exists()


def test_odd_boxes_are_said_and_left_out(folder, capsys):
    dataset = json.loads((folder / "all.json").read_text())
    dataset["annotations"].append({"id": 3, "image_id": 1, "category_id": 7, "bbox": [5, 5, 0, 9]})
    dataset["annotations"].append({"id": 4, "image_id": 1, "category_id": 7, "bbox": [500, 5, 9, 9]})
    (folder / "all.json").write_text(json.dumps(dataset))
    assert main(["detect", "check", str(folder / "all.json"), str(folder)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "1 boxes without area" in lines[0]
    assert "annotation 3 in 1.png" in lines[0]
    assert "1 boxes lie outside their picture" in lines[1]


def test_a_picture_that_cannot_be_read(folder, weights, capsys):
    (folder / "bad.png").write_bytes(b"x")
    words = ["--weights", weights, "--config", RECIPE, "--device", "cpu", "--image_size", "64"]
    argv = ["predict", folder / "bad.png", folder / "1.png", *words, "--output", folder / "out"]
    failed(capsys, 1, "1 of 2 inputs could not be read", argv=argv)
    assert set(os.listdir(folder / "out")) == {"1.png", "predictions.json"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train"], ["name a recipe"]),
        (["train", "--config", "none.py"], ["there is no config none.py"]),
        (["train", "--config", str(RECIPE), "--data", "nowhere"], ["there is no data folder nowhere"]),
        (["train", "--config", str(RECIPE), "--epochs", "0"], ["epochs 0"]),
        (["train", "--config", str(RECIPE), "--cfg_options", "[modle.type=1]"], ["the config has no modle"]),
        (["eval"], ["give either --weights"]),
        (["eval", "--predictions", "x.json"], ["--predictions needs --val_annotations"]),
        (["eval", "--weights", "x.pth", "--data", "nowhere"], ["neither a file nor the name"]),
        (["predict", "nowhere.png", "--weights", "x.pth"], ["nowhere.png: no such file"]),
        (["predict", "nowhere.png"], ["give --weights"]),
        (["predict", str(RECIPE), "--weights", "replknet_31b.in1k_224"], ["for classification; for detection there"]),
        (["complexity", "replknet_31b.in1k_fcos_coco", "--size", "0"], ["--size 0"]),
        (["complexity", "nothing.py"], ["there is no config nothing.py"]),
        (["check", "none.json", "."], ["no annotation file none.json"]),
        (["eavl"], ["did you mean eval?"]),
    ],
)
def test_requests_that_are_wrong(argv, words, capsys):
    failed(capsys, 2, *words, argv=argv)


@pytest.mark.parametrize("missing", ["onedl-mmdetection", "onedl-mmcv"])
def test_without_the_extra(missing):
    code = f"""
import importlib.metadata as m
from replknet.cli import main
real = m.version
def version(name):
    if name == {missing!r}:
        raise m.PackageNotFoundError(name)
    return real(name)
m.version = version
raise SystemExit(main(["detect", "complexity"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert missing in line
    assert "pip install 'replknet[detection]'" in line
