"""Label maps that do not fit are refused with one line that names the file."""

import numpy as np
import pytest
from PIL import Image

from replknet._errors import RunError, UsageError
from replknet.tasks.openmmlab import require

require("segmentation")
import replknet.tasks.segmentation  # noqa: E402, F401
from replknet.tasks.segmentation.folder_dataset import SegmentationFolder, default_palette, read_classes  # noqa: E402
from replknet.tasks.segmentation.labels import LoadCheckedAnnotations, read_labels, reduce_zero  # noqa: E402

STEPS = [{"type": "LoadImageFromFile"}, {"type": "LoadCheckedAnnotations"}]


@pytest.fixture
def folder(tmp_path):
    """Two pictures with label maps and three classes."""
    for name in "ab":
        for kind in ("images", "labels"):
            (tmp_path / kind).mkdir(exist_ok=True)
        Image.new("RGB", (20, 10), (9, 99, 199)).save(tmp_path / "images" / f"{name}.jpg")
        Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20) % 3).save(tmp_path / "labels" / f"{name}.png")
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    return tmp_path


def first(folder, **options):
    return SegmentationFolder(str(folder), pipeline=STEPS, **options)[0]


def test_reads_pairs_classes_and_colours(folder):
    data = SegmentationFolder(str(folder), pipeline=STEPS)
    assert len(data) == 2
    assert data.metainfo["classes"] == ("sky", "road", "car")
    assert data.metainfo["palette"] == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    assert data[1]["gt_seg_map"].shape == data[1]["img"].shape[:2] == (10, 20)
    (folder / "classes.txt").write_text("sky 1 2 3\nwide road 4, 5, 6\ncar 7 8 9\n")
    assert read_classes(folder / "classes.txt") == (["sky", "wide road", "car"], [[1, 2, 3], [4, 5, 6], [7, 8, 9]])


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_modes_of_label_maps(mode, folder):
    labels = np.array([[0, 1], [2, 255]], np.uint8)
    image = Image.fromarray(labels.astype(np.uint16)) if mode == "I;16" else Image.fromarray(labels)
    if mode == "P":
        image.putpalette([3, 2, 1] * 256)
    image.save(folder / "m.png")
    assert np.array_equal(read_labels(folder / "m.png"), labels)


def shifted(folder):
    Image.fromarray(np.full((10, 20), 3, np.uint8)).save(folder / "labels/a.png")


def colours(folder):
    Image.new("RGB", (20, 10)).save(folder / "labels/a.png")


def greys(folder):
    Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20)).save(folder / "labels/a.png")


def other_size(folder):
    Image.new("L", (10, 20)).save(folder / "labels/a.png")


def truncated(folder):
    path = folder / "labels/a.png"
    path.write_bytes(path.read_bytes()[:40])


def empty(folder):
    (folder / "labels/a.png").write_bytes(b"")


def sixteen_bits(folder):
    Image.fromarray(np.full((10, 20), 3000, np.uint16)).save(folder / "labels/a.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shifted, r"holds 3, the class list has 3 \(0 to 2, 255\); if labels start at 1, set reduce_zero_label=True"),
        (greys, "are these colours or grey values"),
        (colours, "mode RGB, 3 channels"),
        (other_size, "is 20x10, its picture .*a.jpg is 10x20"),
        (truncated, "cannot be read"),
        (empty, "cannot be read"),
        (sixteen_bits, "values up to 3000"),
    ],
)
def test_a_label_map_that_does_not_fit(damage, message, folder):
    damage(folder)
    with pytest.raises(RunError, match=message) as caught:
        first(folder)
    assert "a.png" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_that_start_at_one(folder):
    labels = np.array([[0, 1, 3, 255]], np.uint8)
    assert reduce_zero(labels).tolist() == [[255, 0, 2, 255]]
    shifted(folder)
    assert np.unique(first(folder, reduce_zero_label=True)["gt_seg_map"]).tolist() == [2]


def test_a_class_subset_is_remapped(folder):
    results = {"seg_map_path": folder / "labels/a.png", "img_path": "a", "ori_shape": (10, 20), "seg_fields": []}
    got = LoadCheckedAnnotations(num_classes=2).transform({**results, "label_map": {0: 255, 1: 0, 2: 1}})["gt_seg_map"]
    want = read_labels(folder / "labels/a.png")
    assert np.array_equal(got, np.array([255, 0, 1], np.uint8)[want])


def lose_label(folder):
    (folder / "labels/b.png").unlink()


def lose_classes(folder):
    (folder / "classes.txt").unlink()


def no_classes(folder):
    (folder / "classes.txt").write_text("\n")


def twice(folder):
    (folder / "classes.txt").write_text("sky\nsky\n")


def no_pictures(folder):
    for path in (folder / "images").iterdir():
        path.unlink()


def no_labels_folder(folder):
    (folder / "labels").rename(folder / "masks")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_label, "1 of 2 pictures in .*images have no label map: .*labels/b.png"),
        (lose_classes, "there is no class list"),
        (no_classes, "lists 0 classes"),
        (twice, "lists 'sky' twice"),
        (no_pictures, "no pictures in"),
        (no_labels_folder, "there is no folder .*labels/train; needed are images/, labels/ and"),
    ],
)
def test_a_folder_that_is_not_whole(damage, message, folder):
    damage(folder)
    with pytest.raises(UsageError, match=message):
        first(folder)


def test_colours_are_distinct():
    assert len({tuple(color) for color in default_palette(256)}) == 256
