"""Labels, pictures and boxes as training gets them."""

import json

import numpy as np
import pytest
from PIL import Image

from replknet._errors import RunError
from replknet.data.images import BrokenImageError
from replknet.tasks.detection.data import CheckedCoco, CocoPictures, LoadPicture


def pictures(path, folder, classes, **options):
    return CocoPictures(
        ann_file=str(path), data_prefix={"img": str(folder)}, metainfo={"classes": classes}, pipeline=[], **options
    )


def test_labels_follow_the_names_and_not_the_file(coco_folder):
    for classes in (("chair", "bottle", "person"), ("person", "chair", "bottle")):
        data = pictures(coco_folder / "all.json", coco_folder, classes)
        labels = [instance["bbox_label"] for instance in data[0]["instances"]]
        truth = json.loads((coco_folder / "all.json").read_text())
        names = {category["id"]: category["name"] for category in truth["categories"]}
        wanted = [names[a["category_id"]] for a in truth["annotations"] if names[a["category_id"]] in classes]
        assert [classes[label] for label in labels] == wanted
        ids = {name: number for number, name in names.items()}
        assert data.metainfo["category_ids"] == [ids[name] for name in classes]


def test_pictures_without_objects(coco_folder, dataset, written):
    dataset["annotations"] = [a for a in dataset["annotations"] if a["image_id"] == 1]
    path = written(dataset)
    classes = tuple(CheckedCoco(path).found.classes)
    kept = {"filter_cfg": {"filter_empty_gt": False, "min_size": 32}}
    assert len(pictures(path, coco_folder, classes, **kept)) == 2
    assert len(pictures(path, coco_folder, classes, filter_cfg={"filter_empty_gt": True, "min_size": 32})) == 1
    assert len(pictures(path, coco_folder, classes, test_mode=True)) == 2


def test_boxes_that_cannot_be_learned_are_left_out(coco_folder, dataset, written):
    dataset["annotations"][0]["bbox"][2] = 0
    dataset["annotations"][1]["bbox"][:2] = [600, 20]
    path = written(dataset)
    data = pictures(path, coco_folder, CheckedCoco(path).found.classes)
    assert len(data[0]["instances"]) == 17


def test_load_picture_is_blue_first_and_whole(coco_folder, tmp_path):
    path = coco_folder / "voc.png"
    found = LoadPicture()({"img_path": str(path), "width": 500, "height": 375})
    assert found is not None
    assert np.array_equal(found["img"][:, :, ::-1], np.asarray(Image.open(path).convert("RGB")))
    assert found["img_shape"] == found["ori_shape"] == (375, 500)
    with pytest.raises(RunError, match="annotated as 375x500"):
        LoadPicture()({"img_path": str(path), "width": 375, "height": 500})
    broken = tmp_path / "half.png"
    broken.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(BrokenImageError, match=r"half\.png"):
        LoadPicture()({"img_path": str(broken)})


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "1", "I;16"])
def test_load_picture_of_any_mode(tmp_path, mode):
    picture = Image.new("L", (20, 10), 200) if mode == "I;16" else Image.new("RGB", (20, 10), (200, 10, 10))
    name = tmp_path / ("some.tif" if mode in ("CMYK", "I;16") else "some.png")
    (Image.fromarray(np.full((10, 20), 40000, np.uint16)) if mode == "I;16" else picture.convert(mode)).save(name)
    found = LoadPicture()({"img_path": str(name)})
    assert found is not None
    assert found["img"].shape == (10, 20, 3)
    assert found["img"].dtype == np.uint8
