"""ADE20K's and Cityscapes' folders: what is missing or does not fit is named; Cityscapes' training labels."""

import numpy as np
import pytest
from PIL import Image

from replknet import cli
from replknet._errors import UsageError
from replknet.tasks.openmmlab import require

require("segmentation")
import replknet.tasks.segmentation  # noqa: E402, F401
from replknet.tasks.segmentation.layouts import (  # noqa: E402
    CITYSCAPES_TRAIN_IDS,
    check_layout,
    find_layout,
    write_train_ids,
)

from .conftest import save  # noqa: E402


@pytest.fixture
def ade20k(tmp_path):
    for split in ("training", "validation"):
        for number in range(3):
            picture = np.full((8, 12, 3), 40 * number, np.uint8)
            labels = np.arange(96, dtype=np.uint8).reshape(8, 12) + 50 * number
            save(tmp_path / "images" / split / f"ADE_{number}.jpg", picture)
            save(tmp_path / "annotations" / split / f"ADE_{number}.png", np.minimum(labels, 150))
    return tmp_path


@pytest.fixture
def cityscapes(tmp_path):
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "lindau")):
        name = f"{city}_000000_000019"
        labels = np.arange(34, dtype=np.uint8).repeat(2).reshape(4, 17)
        save(tmp_path / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", np.zeros((4, 17, 3), np.uint8))
        save(tmp_path / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", labels)
    return tmp_path


def test_ade20k_counts_as_training_does(ade20k):
    report = check_layout("ade20k", ade20k, "train")
    assert (report.pictures, report.problems) == (3, [])
    assert report.pixels[255] == 1  # label 0 of the first map
    assert report.pixels[149] == 46  # labels 100 to 195 of the third map, cut at 150
    assert report.unused(150) == []


def test_a_missing_label_map_is_named(ade20k):
    (ade20k / "annotations/validation/ADE_1.png").unlink()
    with pytest.raises(UsageError, match=r"1 of 3 label maps are missing: .*annotations/validation/ADE_1.png"):
        check_layout("ade20k", ade20k, "val")
    (ade20k / "images").rename(ade20k / "pictures")
    with pytest.raises(UsageError, match=r"there is no folder .*images/training"):
        check_layout("ade20k", ade20k, "train")


def test_every_misfit_is_reported_and_the_command_fails(ade20k, capsys):
    save(ade20k / "annotations/training/ADE_0.png", np.full((8, 12), 200, np.uint8))
    save(ade20k / "annotations/training/ADE_1.png", np.zeros((12, 8), np.uint8))
    (ade20k / "images/training/ADE_2.jpg").write_bytes(b"")
    assert cli.main(["segment", "check", "ade20k", str(ade20k)]) == 1
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert "ADE_0.png holds 199, the class list has 150" in lines[0]
    assert "ADE_1.png is 12x8, its picture" in lines[1]
    assert "ADE_2.jpg: the file is empty" in lines[2]
    assert lines[3] == "replknet: 3 label maps or pictures do not fit"
    assert "val: 3 pictures, 150 classes" in said.out


def test_cityscapes_training_labels(cityscapes, capsys):
    with pytest.raises(UsageError, match=r"2 of 2 label maps are missing \(`replknet segment prepare`\): .*aachen"):
        find_layout("cityscapes", cityscapes, "train")
    assert cli.main(["segment", "prepare", str(cityscapes)]) == 0
    assert "3 label maps written" in capsys.readouterr().out
    with Image.open(next(cityscapes.rglob("lindau*_labelTrainIds.png"))) as image:
        written = np.asarray(image)
    want = [CITYSCAPES_TRAIN_IDS.get(label, 255) for label in range(34) for _ in range(2)]
    assert written.reshape(-1).tolist() == want
    assert list(write_train_ids(cityscapes)) == []
    assert len(list(write_train_ids(cityscapes, overwrite=True))) == 3
    assert cli.main(["segment", "check", "cityscapes", str(cityscapes)]) == 0
    assert "train: 2 pictures, 19 classes, 44.1 % ignored" in capsys.readouterr().out


def test_the_ids_are_those_of_mmsegs_classes():
    # cityscapesScripts: road 7, person 24, rider 25, car 26, train 31, bicycle 33; licence plate, bridge, ... ignored.
    classes = ["road", "person", "rider", "car", "train", "bicycle"]
    from mmseg.utils import cityscapes_classes

    names = cityscapes_classes()
    assert [names[CITYSCAPES_TRAIN_IDS[label]] for label in (7, 24, 25, 26, 31, 33)] == classes
    assert sorted(CITYSCAPES_TRAIN_IDS.values()) == list(range(19))


def test_no_cityscapes_there(tmp_path):
    with pytest.raises(UsageError, match="there are no"):
        list(write_train_ids(tmp_path))
    with pytest.raises(UsageError, match="there is no folder"):
        check_layout("cityscapes", tmp_path / "absent", "train")
