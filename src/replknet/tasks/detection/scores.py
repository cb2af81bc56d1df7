"""COCO's average precision, by pycocotools or faster-coco-eval."""

import contextlib
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from mmdet.registry import METRICS
from mmdet.structures.mask import encode_mask_results
from mmengine.evaluator import BaseMetric
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from replknet._errors import RunError, UsageError
from replknet._files import write_text
from replknet.tasks.detection.annotations import check_classes
from replknet.tasks.detection.data import CheckedCoco

Evaluator = Literal["pycocotools", "faster-coco-eval"]
Kind = Literal["bbox", "segm"]
NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
"""COCO's six averages, in the order of its summary."""

_log = logging.getLogger(__name__)


def average_precision(
    truth: CheckedCoco,
    predictions: Sequence[dict[str, Any]],
    kind: Kind,
    *,
    category_ids: Sequence[int] | None = None,
    evaluator: Evaluator = "pycocotools",
) -> tuple[dict[str, float], dict[int, float]]:
    """Score boxes or masks as the COCO challenge does: at most 100 a picture, IoU 0.5 to 0.95.

    Args:
        truth: the annotations.
        predictions: COCO results: `image_id`, `category_id`, `bbox` or `segmentation`, `score`.
        kind: "bbox" or "segm".
        category_ids: categories that count; None for all.
        evaluator: which library counts.

    Returns:
        The values of `NAMES`, from 0 to 1, NaN for a size that no object has; and AP by category id.
    """
    if evaluator not in get_args(Evaluator):
        raise UsageError(f"unknown evaluator {evaluator!r}; known: {', '.join(get_args(Evaluator))}")
    ids = list(truth.getCatIds() if category_ids is None else category_ids)
    if not any(truth.getAnnIds(catIds=[key]) for key in ids):
        raise UsageError(f"{truth.found.path} has no boxes of these classes: there is nothing to score")
    found = [_scored(prediction, kind) for prediction in predictions if prediction["category_id"] in set(ids)]
    if not found:
        return dict.fromkeys(NAMES, 0.0), dict.fromkeys(ids, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = _evaluation(truth, found, kind, evaluator)
        evaluation.params.catIds = ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = [float(value) for value in evaluation.stats[:6]]
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
    of_class = {key: _mean(precision[:, :, index]) for index, key in enumerate(ids)}
    return {name: value if value >= 0 else float("nan") for name, value in zip(NAMES, stats, strict=True)}, of_class


def _scored(prediction: dict[str, Any], kind: Kind) -> dict[str, Any]:
    """What the evaluation of `kind` reads: with a box, masks would be sorted into sizes by the area of the box."""
    own = "bbox" if kind == "bbox" else "segmentation"
    if own not in prediction:
        raise RunError(f"a prediction of image {prediction.get('image_id')} has no {own}: {kind} cannot be scored")
    return {key: prediction[key] for key in ("image_id", "category_id", own, "score")}


def _evaluation(truth: CheckedCoco, found: Any, kind: Kind, evaluator: Evaluator) -> Any:
    if evaluator == "pycocotools":
        return COCOeval(truth, truth.loadRes(found), kind)
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise UsageError("faster-coco-eval is not installed: pip install faster-coco-eval") from error
    fast = COCO(cast("dict[str, Any]", truth.dataset))
    return COCOeval_faster(fast, fast.loadRes(found), kind)


def _mean(precision: np.ndarray) -> float:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else float("nan")


@METRICS.register_module()
class CocoScores(BaseMetric):
    """Average precision of a data set, for configs.

    Args:
        ann_file: COCO file of the data set.
        metric: "bbox", "segm" or both.
        evaluator: "pycocotools" or "faster-coco-eval".
        classwise: AP of every class too, as `bbox_AP/NAME`.
        save_to: JSON file for the predictions in COCO's result format.
    """

    default_prefix = "coco"

    def __init__(
        self,
        ann_file: str,
        metric: Kind | Sequence[Kind] = "bbox",
        evaluator: Evaluator = "pycocotools",
        classwise: bool = False,
        save_to: str | None = None,
        collect_device: str = "cpu",
        prefix: str | None = None,
    ):
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.kinds: list[Kind] = [metric] if isinstance(metric, str) else list(metric)  # type: ignore[list-item]
        if unknown := [kind for kind in self.kinds if kind not in get_args(Kind)]:
            raise UsageError(f"metric {', '.join(unknown)}: known are bbox and segm")
        self.truth = CheckedCoco(ann_file)
        self.evaluator: Evaluator = evaluator
        self.classwise, self.save_to = classwise, save_to

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep the predictions of a batch in COCO's result format, labels still instead of categories."""
        # One entry a picture: the base class cuts what several processes collected to the number of pictures.
        for sample in data_samples:
            self.results.append(as_results(sample["pred_instances"], sample["img_id"]))

    def compute_metrics(self, results: list[list[dict[str, Any]]]) -> dict[str, float]:
        """The averages over all pictures."""
        classes = list(self.dataset_meta["classes"])  # type: ignore[index]
        check_classes(self.truth.found, classes, "the model")
        ids = self.truth.get_cat_ids(classes)
        predictions = [
            {**{k: v for k, v in result.items() if k != "label"}, "category_id": ids[result["label"]]}
            for picture in results
            for result in picture
        ]
        if self.save_to is not None:
            write_text(Path(self.save_to), json.dumps(predictions))
        scores: dict[str, float] = {}
        for kind in self.kinds:
            averages, of_class = average_precision(
                self.truth, predictions, kind, category_ids=ids, evaluator=self.evaluator
            )
            scores |= {f"{kind}_{name}": value for name, value in averages.items()}
            if self.classwise:
                scores |= {f"{kind}_AP/{name}": of_class[key] for name, key in zip(classes, ids, strict=True)}
        return scores


def as_results(found: Any, image_id: int) -> list[dict[str, Any]]:
    """Instances of one picture as COCO results, with `label` in the place of `category_id`.

    Args:
        found: `bboxes` `[N, 4]` as corners, `scores` `[N]`, `labels` `[N]`, and `masks` `[N, H, W]` where there are.
        image_id: of the picture.
    """
    boxes = found["bboxes"].cpu().double().numpy()
    results = []
    for (x1, y1, x2, y2), score, label in zip(
        boxes.tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True
    ):
        box = [x1, y1, x2 - x1, y2 - y1]
        results.append({"image_id": image_id, "label": label, "bbox": box, "score": score})
    if "masks" in found:
        for result, mask in zip(results, _encoded(found["masks"]), strict=True):
            result["segmentation"] = {"size": list(mask["size"]), "counts": _text(mask["counts"])}
    return results


def _encoded(masks: Any) -> list[dict[str, Any]]:
    return encode_mask_results(masks.detach().cpu().numpy()) if isinstance(masks, Tensor) else masks


def _text(counts: bytes | str) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts
