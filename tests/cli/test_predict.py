"""`replknet predict` as a user calls it."""

import csv
import json

import pytest
import timm
import torch

from replknet.cli import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    state = timm.create_model("replknet_nano", num_classes=3).state_dict()
    description = {"model": "replknet_nano", "model_kwargs": {}, "num_classes": 3, "class_names": ["ant", "bee", "猫"]}
    description |= {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "in_chans": 3}
    path = tmp_path_factory.mktemp("run") / "best.ckpt"
    torch.save({"state_dict": {f"model.{name}": value for name, value in state.items()}, "replknet": description}, path)
    return path


def predict(*args: object, code: int = 0) -> None:
    assert main(["predict", *map(str, args), "--device", "cpu"]) == code


def test_pictures_get_the_runs_own_names(checkpoint, tmp_path, write_pictures, capsys):
    write_pictures(tmp_path / "in", 3)
    predict(tmp_path / "in", "--weights", checkpoint, "--output", tmp_path / "out" / "answers.json")
    content = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert content["weights"] == "best.ckpt"
    assert [entry["image"] for entry in content["predictions"]] == [
        str(tmp_path / "in" / f"{n}.jpg") for n in (1, 2, 3)
    ]
    for entry in content["predictions"]:
        assert {best["name"] for best in entry["classes"]} == {"ant", "bee", "猫"}
        assert sum(best["probability"] for best in entry["classes"]) == pytest.approx(1, abs=1e-5)
    assert capsys.readouterr().out.count("猫") == 3


def test_a_broken_picture_is_named_and_the_others_go_on(checkpoint, tmp_path, write_pictures, capsys):
    write_pictures(tmp_path, 2)
    (tmp_path / "0.jpg").write_bytes((tmp_path / "1.jpg").read_bytes()[:300])
    predict(tmp_path / "*.jpg", "--weights", checkpoint, "--top", "1", "--output", tmp_path / "answers.csv", code=1)
    rows = list(csv.DictReader((tmp_path / "answers.csv").read_text("utf-8").splitlines()))
    assert [row["image"] for row in rows] == [str(tmp_path / f"{n}.jpg") for n in (0, 1, 2)]
    assert [bool(row["error"]) for row in rows] == [True, False, False]
    error = capsys.readouterr().err
    assert str(tmp_path / "0.jpg") in error
    assert "1 of 3 pictures got no answer" in error


def test_imagenet_names_and_untrained_weights(tmp_path, write_pictures, capsys):
    write_pictures(tmp_path, 1)
    predict(tmp_path / "1.jpg", "--model", "tf_efficientnet_lite0", "--image_size", "32", "--merged", "false")
    captured = capsys.readouterr()
    assert "answers mean nothing" in captured.err
    names = timm.data.ImageNetInfo().label_descriptions()
    shown = [line.split("%  ")[1] for line in captured.out.splitlines()[1:]]
    assert len(shown) == 5
    assert set(shown) <= set(names)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("/absent.png", "--model", "replknet_nano"), "/absent.png: no such file"),
        (("{folder}", "--model", "replknet_nano"), "no pictures in this folder"),
        (("{folder}/x.jpg",), "no model was named"),
        (("{folder}/x.jpg", "--model", "replknet_nano", "--output", "answers.txt"), ".json or .csv"),
        (("{folder}/x.jpg", "--model", "replknet_nano", "--weights", "/absent.ckpt"), "/absent.ckpt"),
        (("{folder}/x.jpg", "--model", "replknet_nano", "--top", "0"), "top 0"),
    ],
    ids=str,
)
def test_wrong_requests_are_one_line(tmp_path, write_pictures, args, message, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    if "x.jpg" in args[0]:
        write_pictures(folder, 1, "x.jpg")
    predict(*(arg.format(folder=folder) for arg in args), code=2)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
