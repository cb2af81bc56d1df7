"""Drawings, videos and COCO JSON."""

import copy
import json
import os

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from replknet._errors import UsageError
from replknet.tasks.detection.detector import Detections, open_detector
from replknet.tasks.detection.drawing import color_of, draw
from replknet.tasks.detection.evaluation import score_file
from replknet.tasks.detection.prediction import predict


@pytest.fixture(scope="module", params=["fcos", "cascade_mask_rcnn"])
def opened(request, small_config):
    """An untrained detector that finds a few objects in anything."""
    config = copy.deepcopy(small_config(request.param))
    test_cfg = config.model.test_cfg
    (test_cfg.rcnn if "rcnn" in test_cfg else test_cfg).update(score_thr=0.0, max_per_img=5)
    torch.manual_seed(0)
    return open_detector(config=config, image_size=128)


def test_pictures(opened, coco_folder, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"nothing")
    paths = [coco_folder / "voc.png", broken, coco_folder / "arc2017.png"]
    seen = []
    report = predict(
        opened, paths, tmp_path / "out", threshold=0.0, on_picture=lambda name, found: seen.append((name, len(found)))
    )
    assert seen == [(str(paths[0]), 5), (str(paths[2]), 5)]
    assert (report.pictures, report.objects) == (2, 10)
    assert len(report.errors) == 1
    assert "broken.jpg" in report.errors[0]
    assert sorted(os.listdir(tmp_path / "out")) == ["arc2017.png", "predictions.json", "voc.png"]
    for name in ("voc.png", "arc2017.png"):
        drawn, original = (np.asarray(Image.open(f / name).convert("RGB")) for f in (tmp_path / "out", coco_folder))
        assert drawn.shape == original.shape
        assert 0.001 < (drawn != original).any(-1).mean() < 0.999


def test_json_is_a_coco_data_set(opened, coco_folder, tmp_path):
    predict(opened, [coco_folder / "voc.png"], tmp_path, threshold=0.0, drawings=False)
    assert os.listdir(tmp_path) == ["predictions.json"]
    coco = COCO(str(tmp_path / "predictions.json"))
    assert len(coco.dataset["categories"]) == 80
    direct = opened.detect(coco_folder / "voc.png")
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    assert [a["score"] for a in annotations] == pytest.approx(direct.scores.tolist())
    for annotation, box, label in zip(annotations, direct.boxes, direct.labels, strict=True):
        x, y, w, h = annotation["bbox"]
        assert (x, y, x + w, y + h) == pytest.approx(box.tolist(), abs=1e-3)
        assert annotation["category_id"] == opened.category_ids[label]
    if direct.masks is not None:
        for annotation, mask in zip(annotations, direct.masks, strict=True):
            assert np.array_equal(coco.annToMask(annotation).astype(bool), mask)
            assert annotation["area"] == mask.sum()
    else:
        assert "segmentation" not in annotations[0]


def test_threshold_and_classes(opened, coco_folder, tmp_path):
    every = opened.detect(coco_folder / "voc.png")
    middle = float(np.sort(every.scores)[2])
    assert len(opened.detect(coco_folder / "voc.png", threshold=middle)) == (every.scores >= middle).sum()
    label = int(every.labels[0])
    name = opened.classes[label]
    only = opened.detect(coco_folder / "voc.png", classes=[name])
    assert set(only.labels) == {label}
    assert len(only) == (every.labels == label).sum()
    with pytest.raises(UsageError, match=r"does not know the class dragon; it knows person, bicycle"):
        predict(opened, [coco_folder / "voc.png"], tmp_path / "none", classes=["dragon"])
    with pytest.raises(UsageError, match="from 0 to 1"):
        predict(opened, [coco_folder / "voc.png"], tmp_path / "none", threshold=1.5)
    assert not (tmp_path / "none").exists()


def video(path, frames: int, size=(160, 120)):
    picture = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10.0, size)
    assert writer.isOpened()
    for index in range(frames):
        writer.write(np.roll(picture, index, 1))
    writer.release()


def test_video(opened, tmp_path):
    video(tmp_path / "film.MP4", 4)
    report = predict(opened, [tmp_path / "film.MP4"], tmp_path / "out", threshold=0.0)
    assert (report.pictures, report.errors) == (4, [])
    assert sorted(os.listdir(tmp_path / "out")) == ["film.mp4", "predictions.json"]
    drawn = cv2.VideoCapture(str(tmp_path / "out" / "film.mp4"))
    assert (drawn.get(cv2.CAP_PROP_FRAME_COUNT), drawn.get(cv2.CAP_PROP_FPS)) == (4, 10)
    assert (drawn.get(cv2.CAP_PROP_FRAME_WIDTH), drawn.get(cv2.CAP_PROP_FRAME_HEIGHT)) == (160, 120)
    images = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
    assert [image["frame"] for image in images] == [0, 1, 2, 3]


def test_videos_that_are_none(opened, tmp_path, capfd):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.avi").write_bytes(b"")
    video(tmp_path / "whole.mp4", 2)
    report = predict(
        opened, [tmp_path / n for n in ("text.mp4", "empty.avi", "whole.mp4")], tmp_path / "out", threshold=0.0
    )
    assert [error.split(": ")[0].rpartition("/")[2] for error in report.errors] == ["text.mp4", "empty.avi"]
    assert sorted(os.listdir(tmp_path / "out")) == ["predictions.json", "whole.mp4"]


def test_inputs_of_the_same_name(opened, coco_folder, tmp_path):
    paths = []
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / "same.jpg")
        Image.open(coco_folder / "voc.png").resize((100, 75)).save(paths[-1])
    predict(opened, paths, tmp_path / "out", threshold=0.0)
    assert sorted(os.listdir(tmp_path / "out")) == ["predictions.json", "same.jpg", "same_2.jpg", "same_3.jpg"]


def test_an_output_that_cannot_be_written(opened, coco_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write there"):
        predict(opened, [coco_folder / "voc.png"], tmp_path / "file")


def test_predictions_are_scored_by_the_names_of_pictures(opened, coco_folder, dataset, tmp_path, written):
    """`predictions.json` numbers pictures in the order of the command line."""
    for category, name in zip(dataset["categories"], opened.classes, strict=False):
        category["name"] = name
    truth = written(dataset)
    scores = []
    for order in (("voc.png", "arc2017.png"), ("arc2017.png", "voc.png")):
        predict(opened, [coco_folder / name for name in order], tmp_path / order[0], threshold=0.0, drawings=False)
        scores.append(score_file(tmp_path / order[0] / "predictions.json", truth))
    assert scores[0] == pytest.approx(scores[1], nan_ok=True)


def test_drawing_by_hand():
    pixels = np.full((120, 160, 3), 200, np.uint8)
    masks = np.zeros((1, 120, 160), bool)
    masks[0, 60:90, 40:120] = True
    found = Detections(np.array([[40.0, 60, 120, 90]], np.float32), np.array([0.876]), np.array([2]), masks, (160, 120))
    drawn = draw(pixels, found, ["a", "b", "thing"])
    assert (pixels == 200).all()
    color = np.array(color_of(2))
    assert np.array_equal(drawn[75, 40], color)
    assert np.array_equal(drawn[75, 80], (0.55 * 200 + 0.45 * color).astype(np.uint8))
    assert np.array_equal(drawn[110, 80], [200, 200, 200])
    # The name stands above the box.
    assert (drawn[45:59, 40:80] != 200).any()
    assert np.array_equal(draw(pixels, found.take(np.array([], int)), ["a", "b", "thing"]), pixels)


@pytest.mark.parametrize("box", [[0, 0, 5, 5], [150, 110, 160, 120], [-3, -3, 200, 200], [10, 10, 10, 10]])
def test_boxes_at_the_edge_can_be_drawn(box):
    pixels = np.zeros((120, 160, 3), np.uint8)
    found = Detections(np.array([box], np.float32), np.array([0.5]), np.array([0]), None, (160, 120))
    assert (draw(pixels, found, ["a long name of a class"]) != 0).any()


def test_colours_of_neighbours_differ():
    colors = np.array([color_of(label) for label in range(80)], float)
    assert len({tuple(color) for color in colors}) == 80
    assert np.linalg.norm(colors[1:] - colors[:-1], axis=1).min() > 100
