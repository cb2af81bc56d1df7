"""`replknet segment train` and `eval`: wrong requests are one line, before anything is built."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from replknet import cli

RECIPE = Path(__file__).parents[2] / "recipes/segmentation/replknet_tiny_upernet_folder.py"
ADE = RECIPE.with_name("replknet_31b_1k_upernet_ade20k_512.py")


@pytest.fixture
def photos(tmp_path):
    """One's own data: two pictures a split, two classes."""
    for kind in ("images", "labels"):
        for split in ("train", "val"):
            (tmp_path / kind / split).mkdir(parents=True)
            for number in range(2):
                shape = (8, 8, 3) if kind == "images" else (8, 8)
                Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / kind / split / f"{number}.png")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "absent.py"], "there is no config absent.py"),
        (["--config", RECIPE], "there is no folder data; give the data set's folder by --data"),
        (["--config", ADE, "--data", "DATA"], "there is no folder .*images/training"),
        (
            ["--config", RECIPE, "--data", "DATA", "--cfg_options", "train_dataloader.batch_size=1"],
            "batch of one picture",
        ),
        (
            ["--config", RECIPE, "--data", "DATA", "--cfg_options", "model.decode_head.num_classes=3"],
            "has 3 classes, the",
        ),
        (["--config", RECIPE, "--data", "DATA", "--cfg_options", "modle.x=1"], "the config has no modle"),
        (["--config", RECIPE, "--data", "DATA", "--may_differ", "decode_head"], "belongs to --weights"),
        (["--config", RECIPE, "--data", "DATA", "--weights", "absent.pth", "--device", "cpu"], "neither a file nor"),
        (["--config", RECIPE, "--data", "DATA", "--device", "cuda:7"], "cuda:7"),
        (["--config", "OLD"], "0.x"),
    ],
    ids=range(10),
)
def test_wrong_trainings(words, message, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.py").write_text("lr_config = dict(policy='poly')\nrunner = dict(max_iters=1)\n")
    given = [{"DATA": str(photos), "OLD": "old.py"}.get(str(word), str(word)) for word in words]
    code = cli.main(["segment", "train", "--output", str(tmp_path / "run"), *given])
    said = capsys.readouterr().err.strip()
    assert code == 2, said
    assert said.count("\n") == 0
    import re

    assert re.search(message, said), said
    assert not (tmp_path / "run" / "last_checkpoint").exists()


def test_eval_needs_data_to_score_on(capsys):
    assert cli.main(["segment", "eval"]) == 2
    assert "give --weights" in capsys.readouterr().err
    assert cli.main(["segment", "eval", "--weights", "replknet_31b.in22k_upernet_ade20k", "--output", "x"]) == 2
    assert "describes no data set to score on; give a recipe by --config" in capsys.readouterr().err


def test_check_of_ones_own_folder(photos, capsys):
    assert cli.main(["segment", "check", "folder", str(photos)]) == 0
    said = capsys.readouterr().out
    assert "train: 2 pictures, 2 classes, 0.0 % ignored; no pixel of classes 1" in said
    assert cli.main(["segment", "check", "folder", str(photos), "--every", "0"]) == 2
