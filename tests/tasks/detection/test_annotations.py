"""COCO files that are broken, and files that are odd."""

import copy
import json
import shutil

import pytest
from PIL import Image

from replknet._errors import RunError, UsageError
from replknet.tasks.detection.annotations import (
    check_classes,
    check_pictures,
    choose_classes,
    read_annotations,
    require_masks,
)


def refused(path, *words: str, kind: type[Exception] = RunError) -> None:
    with pytest.raises(kind) as caught:
        read_annotations(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_whole_file_is_read_without_a_note(coco_folder):
    found = read_annotations(coco_folder / "all.json")
    assert not found.notes
    assert len(found.dataset["annotations"]) == 27
    # By id, as COCO orders its classes: the file lists them the other way round.
    ids = list(found.category_ids.values())
    assert ids == sorted(ids)
    assert found.classes == tuple(found.category_ids)
    require_masks(found)
    check_pictures(found, coco_folder, "full")


def test_missing_and_unreadable_files(tmp_path, written):
    refused(tmp_path / "none.json", "no annotation file", kind=UsageError)
    refused(tmp_path, "is a folder", kind=UsageError)
    refused(written('{"images": [1, 2'), "not JSON", "line 1, column 17")
    refused(written(""), "not JSON")
    refused(written("[]"), "list, not an object")
    refused(written("[" * 100000), "nested too deeply")
    (tmp_path / "binary.json").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    refused(tmp_path / "binary.json", "not JSON")


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_missing_and_wrong_parts(dataset, written, key):
    refused(written({k: v for k, v in dataset.items() if k != key}), f"has no {key!r}")
    refused(written({**dataset, key: {"1": {}}}), f"{key!r}")
    refused(written({**dataset, key: [1]}), f"{key!r}")
    if key != "annotations":
        refused(written({**dataset, key: []}), f"lists no {key}")


SPOILED = {
    "an image without size": (("images", 0, "width", None), "image 1 (voc.png)", "width"),
    "an image of no width": (("images", 0, "width", 0), "image 1 (voc.png)"),
    "an image without name": (("images", 0, "file_name", ""), "image 1 has no file_name"),
    "an image id twice": (("images", 1, "id", 1), "image ids", "more than once: 1"),
    "an id that is text": (("images", 1, "id", "2"), "entries of kind image"),
    "an annotation id twice": (("annotations", 1, "id", 1), "annotation ids", "more than once: 1"),
    "a category twice": (("categories", 1, "name", "bottle"), "same name: bottle"),
    "a category without name": (("categories", 1, "name", None), "category has no name"),
    "an unknown image": (("annotations", 3, "image_id", 77), "no image of this file", "annotation 4", "77"),
    "an unknown category": (
        ("annotations", 3, "category_id", 1000),
        "no category of this file",
        "annotation 4",
        "1000",
    ),
    "three numbers": (("annotations", 3, "bbox", [1, 2, 3]), "four numbers", "annotation 4"),
    "numbers as text": (("annotations", 3, "bbox", ["1", 2, 3, 4]), "four numbers", "annotation 4"),
    "not a number": (("annotations", 3, "bbox", [1, 2, float("nan"), 4]), "four numbers", "annotation 4"),
    "no box": (("annotations", 3, "bbox", None), "four numbers", "annotation 4"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_entries_that_cannot_be_used(dataset, written, what):
    (part, index, key, value), *words = SPOILED[what]
    dataset[part][index][key] = value
    refused(written(dataset), *words)


def test_what_training_can_do_without_is_said(dataset, written):
    boxes = [annotation["bbox"] for annotation in dataset["annotations"]]
    boxes[0][2] = 0
    boxes[1][:2] = [600, 20]
    boxes[2][2:] = [2000, 20]
    dataset["images"].append({"id": 3, "file_name": "empty.png", "width": 10, "height": 10})
    notes = read_annotations(written(dataset)).notes
    assert len(notes) == 4
    assert "1 boxes without area" in notes[0]
    assert "annotation 1 in voc.png" in notes[0]
    assert "1 boxes lie outside" in notes[1]
    assert "annotation 2 in voc.png" in notes[1]
    assert "reach over the edge" in notes[2]
    assert "1 of 3 pictures have no boxes" in notes[3]


def test_missing_area_and_crowd_are_filled_in(dataset, written):
    for annotation in dataset["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    for annotation in read_annotations(written(dataset)).dataset["annotations"]:
        assert annotation["area"] == annotation["bbox"][2] * annotation["bbox"][3]
        assert annotation["iscrowd"] == 0


@pytest.mark.parametrize("outline", [None, [], [[1, 2, 3, 4]], {"size": [1, 1]}])
def test_masks_that_are_not_there(dataset, written, outline):
    dataset["annotations"][5]["segmentation"] = outline
    found = read_annotations(written(dataset))
    with pytest.raises(RunError, match=r"1 of 27 annotations have no usable segmentation \(annotation 6\)"):
        require_masks(found)


def test_classes(coco_folder):
    found = read_annotations(coco_folder / "all.json")
    assert choose_classes(found, None) == found.classes
    assert choose_classes(found, ["person", "chair", "person"]) == ("person", "chair")
    with pytest.raises(UsageError, match=r"no category unicorn; it has: .*and 7 more"):
        choose_classes(found, ["person", "unicorn"])
    check_classes(found, ["person"], "the model")
    assert "left out, as the model does not have it" in found.notes[-1]
    with pytest.raises(UsageError, match=r"has no category zebra, which the training set has"):
        check_classes(found, ["person", "zebra"], "the training set")


def test_pictures(coco_folder, dataset, tmp_path, written):
    path = written(dataset)
    with pytest.raises(UsageError, match="no folder of pictures"):
        check_pictures(read_annotations(path), tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"2 of 2 pictures .* are not in .*: voc.png, arc2017.png"):
        check_pictures(read_annotations(path), tmp_path)
    for name in ("voc.png", "arc2017.png"):
        shutil.copy(coco_folder / name, tmp_path)
    check_pictures(read_annotations(path), tmp_path, "full")
    whole = (tmp_path / "voc.png").read_bytes()
    (tmp_path / "voc.png").write_bytes(whole[: len(whole) // 2])
    check_pictures(read_annotations(path), tmp_path, "headers")
    with pytest.raises(RunError, match=r"cannot read .*voc.png"):
        check_pictures(read_annotations(path), tmp_path, "full")
    (tmp_path / "voc.png").write_bytes(b"no picture at all")
    with pytest.raises(RunError, match=r"cannot read .*voc.png: not a picture in a known format"):
        check_pictures(read_annotations(path), tmp_path)
    check_pictures(read_annotations(path), tmp_path, "files")


def test_a_picture_of_another_size(coco_folder, dataset, written):
    turned = copy.deepcopy(dataset)
    turned["images"][0].update(width=dataset["images"][0]["height"], height=dataset["images"][0]["width"])
    with pytest.raises(RunError, match=r"voc.png is 500x375, annotated as 375x500 \(rotated by its EXIF data"):
        check_pictures(read_annotations(written(turned)), coco_folder)
    dataset["images"][0]["width"] = 501
    with pytest.raises(RunError, match=r"voc.png is 500x375, annotated as 501x375$"):
        check_pictures(read_annotations(written(dataset)), coco_folder)


def test_many_problems_are_counted_not_listed(dataset, tmp_path, written):
    dataset["images"] = [{"id": i, "file_name": f"{i}.png", "width": 8, "height": 8} for i in range(1, 41)]
    for image in dataset["images"]:
        Image.new("RGB", (9, 8)).save(tmp_path / image["file_name"])
    with pytest.raises(RunError, match=r"1.png is 9x8.*; and 37 more$"):
        check_pictures(read_annotations(written(dataset)), tmp_path)


def test_the_file_on_disk_is_left_alone(coco_folder):
    before = (coco_folder / "all.json").read_bytes()
    read_annotations(coco_folder / "all.json").dataset["annotations"].clear()
    assert (coco_folder / "all.json").read_bytes() == before
    assert json.loads(before)["annotations"]
