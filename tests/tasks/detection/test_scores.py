"""Average precision: by hand, and the same from both libraries."""

import json
import math

import numpy as np
import pytest
import torch
from pycocotools import mask as run_lengths

from replknet._errors import RunError, UsageError
from replknet.tasks.detection.data import CheckedCoco
from replknet.tasks.detection.evaluation import score_file
from replknet.tasks.detection.scores import NAMES, CocoScores, as_results, average_precision

EVALUATORS = ["pycocotools", "faster-coco-eval"]


def perfect(truth: CheckedCoco) -> list[dict]:
    keys = ("image_id", "category_id", "bbox", "segmentation")
    return [{**{k: a[k] for k in keys}, "score": 0.5 + a["id"] / 100} for a in truth.dataset["annotations"]]


def noisy(truth: CheckedCoco, seed: int) -> list[dict]:
    """Moved, lost, doubled and mistaken objects: every kind of error counts."""
    draw = np.random.default_rng(seed)
    found = []
    for result in perfect(truth) * 3:
        if draw.random() < 0.3:
            continue
        x, y, w, h = result["bbox"]
        shift = draw.normal(0, 0.08, 4) * [w, h, w, h]
        mask = run_lengths.decode(result["segmentation"])
        moved = np.roll(mask, (int(shift[1]), int(shift[0])), (0, 1))
        encoded = run_lengths.encode(np.asfortranarray(moved))
        category = result["category_id"] if draw.random() < 0.9 else int(draw.choice(truth.getCatIds()))
        found.append(
            {
                "image_id": result["image_id"],
                "category_id": category,
                "bbox": [x + shift[0], y + shift[1], max(w + shift[2], 1), max(h + shift[3], 1)],
                "segmentation": {"size": list(encoded["size"]), "counts": encoded["counts"].decode()},
                "score": float(draw.random()),
            }
        )
    return found


@pytest.fixture(scope="module")
def truth(coco_folder):
    return CheckedCoco(coco_folder / "all.json")


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_annotations_themselves_are_perfect(truth, kind, evaluator):
    scores, of_class = average_precision(truth, perfect(truth), kind, evaluator=evaluator)
    assert tuple(scores) == NAMES
    assert all(value == pytest.approx(1) for value in scores.values())
    assert set(of_class) == set(truth.getCatIds())
    assert all(value == pytest.approx(1) for value in of_class.values())


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_by_hand(coco_folder, dataset, written, evaluator):
    """Two objects of one class, one found exactly, one with an IoU of 0.6 behind a false alarm.

    Precision at the recalls: 1 up to 1/2, then 2/3. Of 101 recall points 51 lie up to 1/2. The loose box counts at IoU
    0.5, 0.55 and 0.6 of ten thresholds.
    """
    dataset["categories"] = [{"id": 5, "name": "thing"}]
    dataset["annotations"] = [
        {"id": i, "image_id": 1, "category_id": 5, "bbox": [100 * i, 50, 100, 100]} for i in (1, 2)
    ]
    found = [
        {"image_id": 1, "category_id": 5, "bbox": [100, 50, 100, 100], "score": 0.9},
        {"image_id": 2, "category_id": 5, "bbox": [0, 0, 50, 50], "score": 0.8},
        {"image_id": 1, "category_id": 5, "bbox": [200, 50, 60, 100], "score": 0.7},
    ]
    scores, _ = average_precision(CheckedCoco(written(dataset)), found, "bbox", evaluator=evaluator)
    at_loose, at_strict = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert scores["AP50"] == pytest.approx(at_loose)
    assert scores["AP75"] == pytest.approx(at_strict)
    assert scores["AP"] == pytest.approx((3 * at_loose + 7 * at_strict) / 10)
    # 100 x 100 pixels are larger than 96²; the false alarm of 50 x 50 does not count there.
    assert scores["AP_large"] == pytest.approx((3 + 7 * at_strict) / 10)
    assert math.isnan(scores["AP_small"])


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_both_libraries_count_the_same(truth, kind, seed):
    found = noisy(truth, seed)
    first, second = (average_precision(truth, found, kind, evaluator=name) for name in EVALUATORS)
    assert 0.05 < first[0]["AP"] < 0.9
    assert first[0] == pytest.approx(second[0], abs=1e-12, nan_ok=True)
    assert first[1] == pytest.approx(second[1], abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_nothing_found_and_nothing_to_find(truth, dataset, written, evaluator):
    scores, of_class = average_precision(truth, [], "segm", evaluator=evaluator)
    assert set(scores.values()) == set(of_class.values()) == {0.0}
    dataset["annotations"] = []
    with pytest.raises(UsageError, match="nothing to score"):
        average_precision(CheckedCoco(written(dataset)), perfect(truth), "bbox", evaluator=evaluator)


def test_unknown_evaluator_and_metric(truth, coco_folder):
    with pytest.raises(UsageError, match="known: pycocotools, faster-coco-eval"):
        average_precision(truth, [], "bbox", evaluator="mine")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="known are bbox and segm"):
        CocoScores(str(coco_folder / "all.json"), metric="proposal")  # type: ignore[arg-type]


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_the_metric_of_a_runner(truth, coco_folder, tmp_path, evaluator):
    """Labels in the order of the model's classes, whatever the order of the file; masks as tensors."""
    classes = tuple(reversed(truth.found.classes))
    metric = CocoScores(
        str(coco_folder / "all.json"), ["bbox", "segm"], evaluator, classwise=True, save_to=str(tmp_path / "found.json")
    )
    metric.dataset_meta = {"classes": classes}
    for image_id in truth.getImgIds():
        annotations = truth.imgToAnns[image_id]
        names = {number: name for name, number in truth.found.category_ids.items()}
        boxes = torch.tensor([a["bbox"] for a in annotations])
        instances = {
            "bboxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
            "scores": torch.linspace(0.9, 0.1, len(annotations)),
            "labels": torch.tensor([classes.index(names[a["category_id"]]) for a in annotations]),
            "masks": torch.tensor(np.stack([run_lengths.decode(a["segmentation"]) for a in annotations])).bool(),
        }
        metric.process({}, [{"pred_instances": instances, "img_id": image_id}])
    scores = metric.evaluate(size=2)
    assert scores["coco/bbox_AP"] == pytest.approx(1)
    assert scores["coco/segm_AP"] == pytest.approx(1)
    assert scores["coco/bbox_AP/person"] == pytest.approx(1)
    saved = score_file(tmp_path / "found.json", coco_folder / "all.json", None, evaluator)  # type: ignore[arg-type]
    assert saved == {k.removeprefix("coco/"): v for k, v in scores.items() if "/" not in k.removeprefix("coco/")}


def test_results_of_no_objects():
    none = {"bboxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long)}
    assert as_results(none, 3) == []
    assert as_results({**none, "masks": torch.zeros(0, 5, 5, dtype=torch.bool)}, 3) == []


def test_files_that_are_no_results(coco_folder, tmp_path):
    path = tmp_path / "found.json"
    with pytest.raises(UsageError, match="no file of predictions"):
        score_file(path, coco_folder / "all.json")
    for contents, message in (
        ("{", "not JSON"),
        ("{}", "not COCO's result format"),
        ('[{"image_id": 1}]', "not COCO's result format"),
        (json.dumps([{"image_id": 9, "category_id": 90, "bbox": [0, 0, 1, 1], "score": 1.0}]), r"ids \[9\]"),
    ):
        path.write_text(contents)
        with pytest.raises(RunError, match=message):
            score_file(path, coco_folder / "all.json")
