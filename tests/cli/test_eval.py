"""`replknet eval` as a user calls it, alone and in several processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from replknet.cli import main
from replknet.data.embedded import DigitsSet


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """The 360 validation digits as a folder of class folders."""
    root = tmp_path_factory.mktemp("digits")
    DigitsSet("validation").save(root / "val")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint as a run leaves it, of an untrained network."""
    torch.manual_seed(0)
    model = timm.create_model("replknet_nano", num_classes=10)
    description = {
        "model": "replknet_nano",
        "model_kwargs": {},
        "num_classes": 10,
        "class_names": [str(digit) for digit in range(10)],
        "image_size": 16,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "in_chans": 3,
    }
    path = tmp_path_factory.mktemp("run") / "best.ckpt"
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "replknet": description}, path)
    return path


def evaluate(*args: object, code: int = 0) -> None:
    assert main(["eval", *map(str, args)]) == code


OPTIONS = ("--loader.workers", "0", "--device", "cpu")


def test_a_run_is_scored_and_compared(digits, checkpoint, tmp_path, capsys):
    output, table = tmp_path / "out" / "result.json", tmp_path / "table.md"
    evaluate(
        "--weights", checkpoint, "--data", digits, "--merged", "compare", "--confusion", "true", *OPTIONS,
        "--output", output, "--markdown", table,
    )  # fmt: skip
    record = json.loads(output.read_text())
    before, after = record["results"]["as trained"], record["results"]["merged"]
    assert before["n"] == after["n"] == 360
    assert before["top1"] == after["top1"]
    assert sum(map(sum, before["confusion"])) == 360
    assert record["merging"]["relative_difference"] < 1e-4
    assert record["classes_matched_by"] == "own names"
    assert (record["image_size"], record["broken"]) == (16, [])
    printed = capsys.readouterr().out
    assert f"{before['top1']:.2f}" in printed
    assert "largest logit difference" in printed
    assert len(table.read_text().splitlines()) == 4


def test_forms_and_sources_agree(digits, checkpoint, tmp_path):
    scores = []
    for merged, source in (("no", "digits"), ("yes", digits)):
        command = ("--weights", checkpoint, "--data", source, "--merged", merged, *OPTIONS)
        evaluate(*command, "--output", tmp_path / "r")
        (result,) = json.loads((tmp_path / "r").read_text())["results"].values()
        scores.append(result["top1"])
    assert scores[0] == scores[1]


def test_several_sources_make_one_table(digits, checkpoint, tmp_path, capsys):
    evaluate(
        "--weights", checkpoint, "--data", json.dumps(["digits", str(digits)]), *OPTIONS, "--output", tmp_path / "r"
    )
    assert len(json.loads((tmp_path / "r").read_text())["evaluations"]) == 2
    assert capsys.readouterr().out.count("| replknet_nano | best.ckpt |") == 2


def test_a_flat_folder_of_a_runs_own_classes(digits, checkpoint, tmp_path):
    (tmp_path / "flat").mkdir()
    numbers = []
    for number, path in enumerate(sorted(digits.glob("val/*/*.png"))[::12]):
        (tmp_path / "flat" / f"{number:03d}.png").write_bytes(path.read_bytes())
        numbers.append(path.parent.name)
    (tmp_path / "labels.txt").write_text("\n".join(numbers))
    command = ("--weights", checkpoint, "--data", tmp_path / "flat", "--labels", tmp_path / "labels.txt", *OPTIONS)
    for place in ("worker", "device"):
        evaluate(
            *command, "--loader.normalize_on", place, "--loader.channels_last", "true", "--output", tmp_path / place
        )
    records = [json.loads((tmp_path / place).read_text()) for place in ("worker", "device")]
    results = [record["results"]["as trained"] for record in records]
    assert results[0]["n"] == 30
    assert records[0]["classes_matched_by"] == "own names"
    assert results[0]["top1"] == results[1]["top1"]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-4)


def test_options_from_yaml(digits, checkpoint, tmp_path, capsys):
    config = tmp_path / "eval.yaml"
    config.write_text(f"weights: {checkpoint}\ndata: {digits}\nbatch_size: 100\nloader:\n  workers: 0\n")
    evaluate("--config", config, "--image_size", "8", "--device", "cpu")
    assert "| 8 | as trained |" in capsys.readouterr().out


def test_broken_pictures_are_named(checkpoint, tmp_path, capsys):
    DigitsSet("validation").save(tmp_path / "val")
    broken = sorted((tmp_path / "val" / "3").iterdir())[2]
    broken.write_bytes(broken.read_bytes()[:60])
    evaluate("--weights", checkpoint, "--data", tmp_path, *OPTIONS, code=1)
    assert str(broken) in capsys.readouterr().err
    evaluate(
        "--weights", checkpoint, "--data", tmp_path, *OPTIONS, "--loader.broken", "skip", "--output", tmp_path / "r"
    )
    record = json.loads((tmp_path / "r").read_text())
    assert record["results"]["as trained"]["n"] == 359
    assert len(record["broken"]) == 1
    assert str(broken) in capsys.readouterr().err


def test_a_subset_of_imagenet_lets_only_its_classes_win(tmp_path, write_pictures):
    ids = timm.data.ImageNetInfo().label_names()
    for index in (7, 400, 3):
        write_pictures(tmp_path / "imagenet-a" / ids[index], 2)
    for classes, count in (("auto", 3), ("all", 1000)):
        evaluate(
            "tf_efficientnet_lite0", "--data", tmp_path / "imagenet-a", "--image_size", "32", "--classes", classes,
            *OPTIONS, "--output", tmp_path / "r",
        )  # fmt: skip
        record = json.loads((tmp_path / "r").read_text())
        assert record["classes_matched_by"] == "WordNet ids"
        assert record["results"]["as trained"]["classes"] == count


def test_real_labels_of_a_flat_folder(tmp_path, write_pictures, capsys):
    write_pictures(tmp_path / "val", 3, "ILSVRC2012_val_{:08d}.JPEG")
    (tmp_path / "val.txt").write_text("5\n6\n999\n")
    (tmp_path / "real.json").write_text(json.dumps([list(range(1000)), [], []]))
    evaluate(
        "tf_efficientnet_lite0", "--data", tmp_path / "val", "--labels", tmp_path / "val.txt", "--image_size", "32",
        "--real_labels", tmp_path / "real.json", *OPTIONS, "--output", tmp_path / "r",
    )  # fmt: skip
    result = json.loads((tmp_path / "r").read_text())["results"]["as trained"]
    assert (result["real_top1"], result["real_n"], result["n"]) == (100.0, 1, 3)
    assert "has no weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("replknet_nano",), 2, "no data were named"),
        (("replknet_nanno", "--data", "digits"), 2, "near names"),
        (("replknet_nano", "--data", "/absent"), 2, "/absent: no such data"),
        (("replknet_nano", "--data", "digits", "--num_classes", "7"), 2, "10 classes"),
        (("replknet_nano", "--data", "digits", "--batch_size", "0"), 2, "batch size 0"),
        (("replknet_nano", "--data", "digits", "--device", "cuda:99"), 2, "device cuda:99"),
        (("replknet_nano", "--data", "digits", "--device", "abacus"), 2, "device abacus"),
        (("--data", "digits"), 2, "no model was named"),
        (("replknet_nano", "--data", "digits", "--merged", "perhaps"), 2, "perhaps"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_requests_are_one_line(args, code, message, capsys):
    evaluate(*args, code=code)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_processes_count_every_picture_once(checkpoint, tmp_path):
    DigitsSet("validation").save(tmp_path / "val")
    next((tmp_path / "val" / "3").iterdir()).unlink()  # 359: two processes cannot share them evenly
    options = ("--weights", checkpoint, "--data", tmp_path, "--confusion", "true", *OPTIONS)
    evaluate(*options, "--output", tmp_path / "one.json")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "replknet", "eval")
    command = [sys.executable, *launcher, *options, "--batch_size", "7", "--output", tmp_path / "two.json"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=240)
    records = [json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json")]
    one, two = (record["results"]["as trained"] for record in records)
    assert one["n"] == 359
    for name in ("n", "top1", "top5", "confusion"):
        assert one[name] == two[name], name
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
