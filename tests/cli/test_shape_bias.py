"""`replknet shape-bias`: files, figures and exit codes."""

import json

import pytest
import torch
from PIL import Image

from replknet.analysis.shape_bias import read_csv
from replknet.cli import main


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "cue-conflict"
    for index, (shape, texture) in enumerate([("cat", "dog"), ("cat", "cat"), ("oven", "bird")]):
        (folder / shape).mkdir(parents=True, exist_ok=True)
        colour = (80 * index, 120, 90)
        Image.new("RGB", (224, 224), colour).save(folder / shape / f"{shape}{index}-{texture}1.png")
    return folder


def run(*args):
    return main(["shape-bias", *map(str, args)])


def test_several_networks(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    code = run("resnet18", "replknet_nano,label=nano", "--images", pictures, "--output", out, "--format", "svg")
    assert code == 0
    assert {path.name for path in out.iterdir()} == {
        "resnet18.json",
        "resnet18_confusion.svg",
        "cue-conflict_resnet18_session-1.csv",
        "nano.json",
        "nano_confusion.svg",
        "cue-conflict_nano_session-1.csv",
        "shape_bias.svg",
    }
    account = json.loads((out / "nano.json").read_text())
    result = read_csv(out / "cue-conflict_nano_session-1.csv")
    assert (account["conflicts"], account["shape_decisions"]) == (2, result.shape_decisions)
    assert account["mean"] == pytest.approx([0.485, 0.456, 0.406])
    printed = capsys.readouterr()
    assert "humans" in printed.out
    assert "0.9587" in printed.out
    assert "3 of the 1280 pictures" in printed.err
    assert "(nano): the weights are random" in printed.err


def test_random_weights_repeat(pictures, tmp_path):
    for name in ("a", "b"):
        torch.manual_seed(hash(name) % 1000)
        run("replknet_nano", "--images", pictures, "--output", tmp_path / name)
    first, second = ((tmp_path / name / "cue-conflict_replknet-nano_session-1.csv").read_text() for name in ("a", "b"))
    assert first == second


def test_decisions_made_elsewhere(pictures, tmp_path, capsys):
    run("replknet_nano", "--images", pictures, "--output", tmp_path / "a")
    capsys.readouterr()
    path = tmp_path / "a" / "cue-conflict_replknet-nano_session-1.csv"
    assert run("--decisions", f"[{path}]", "--output", tmp_path / "b") == 0
    assert "replknet_nano" in capsys.readouterr().out
    assert [entry.name for entry in (tmp_path / "b").iterdir()] == ["shape_bias.png"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "name at least one network"),
        (("resnet18",), "give --images"),
        (("resnet18", "--images", "none"), "none: no such folder"),
        (("resnet18", "resnet18", "--images", "PICTURES"), "same name"),
        (("resnet18,num_classes:=10", "--images", "PICTURES"), "1000 classes of ImageNet"),
        (("resnet18", "--images", "PICTURES", "--batch_size", "0"), "batch_size is at least 1"),
        (("--decisions", "[none.csv]"), "none.csv: no such file"),
    ],
)
def test_wrong_requests(pictures, tmp_path, args, message, capsys):
    filled = [pictures if arg == "PICTURES" else arg for arg in args]
    assert run(*filled, "--output", tmp_path / "out") == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert message in printed[-1]
    assert not (tmp_path / "out").exists()


def test_a_broken_picture(pictures, tmp_path, capsys):
    (pictures / "cat" / "cat9-dog1.png").write_bytes(b"\x89PNG half")
    assert run("resnet18", "--images", pictures, "--output", tmp_path / "out") == 1
    assert "cat9-dog1.png" in capsys.readouterr().err
