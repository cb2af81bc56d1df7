"""`replknet curves` draws the logs of runs."""

import json
from pathlib import Path

import pytest
from PIL import Image

from replknet.cli import main


def log(folder: Path, *records: dict) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def first(tmp_path):
    return log(tmp_path / "x" / "run", {"step": 5, "train/loss": 1.0}, {"step": 5, "val/top1": 20.0})


@pytest.fixture
def second(tmp_path):
    return log(tmp_path / "y" / "run", {"step": 7, "train/loss": 0.5}, {"step": 7, "val/top1": 30.0})


def test_one_run_keeps_its_figure(first, capsys):
    # Under way: the last line is not whole.
    with (first / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train')
    assert main(["curves", str(first)]) == 0
    assert capsys.readouterr().out.strip() == str(first / "curves.png")
    with Image.open(first / "curves.png") as picture:
        assert picture.width > picture.height > 300


def test_several_runs_of_one_name_share_a_figure(first, second, tmp_path):
    figure = tmp_path / "new" / "both.svg"
    assert main(["curves", str(first), str(second), "--output", str(figure), "--target", "97"]) == 0
    text = figure.read_text()
    assert "x/run, test" in text
    assert "y/run, test" in text
    assert "97 %" in text


def test_mistakes_take_one_line(first, second, tmp_path, capsys):
    for arguments, reason in (
        ([tmp_path], "no metrics.jsonl"),
        ([first, second], "--output"),
        ([first, "--output", tmp_path / "a.gif"], "png, svg, pdf"),
        ([first, "--output", tmp_path / "a"], "png, svg, pdf"),
    ):
        assert main(["curves", *map(str, arguments)]) == 2
        error = capsys.readouterr().err.strip()
        assert reason in error
        assert "\n" not in error
    (first / "metrics.jsonl").write_text("not json\n")
    assert main(["curves", str(first)]) == 2
    assert "damaged" in capsys.readouterr().err
