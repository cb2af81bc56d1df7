"""Scores of a detector on a COCO data set, before or after merging."""

import json
import uuid
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from replknet._errors import RunError, UsageError
from replknet.tasks.detection.annotations import Progress, require_masks
from replknet.tasks.detection.data import CheckedCoco
from replknet.tasks.detection.detector import (
    OpenedDetector,
    has_masks,
    open_detector,
    prepare_for_inference,
)
from replknet.tasks.detection.scores import Evaluator, Kind, average_precision
from replknet.tasks.detection.training import DataPaths, use_scoring_data
from replknet.tasks.openmmlab import runner
from replknet.tasks.openmmlab.runner import Precision, load_weights


def evaluate(
    weights: str | Path,
    paths: DataPaths,
    *,
    config: Config | None = None,
    merged: bool = True,
    image_size: int | None = None,
    batch_size: int = 1,
    workers: int = 2,
    evaluator: Evaluator = "pycocotools",
    classwise: bool = False,
    save_to: str | Path | None = None,
    output: str | Path = "runs/detect-eval",
    device: str = "auto",
    precision: Precision = "fp32",
    progress: Progress | None = None,
) -> tuple[dict[str, float], list[str]]:
    """COCO's average precision, under torchrun shared among processes.

    Args:
        weights, config, merged, image_size: as for `open_detector`.
        paths: data to score on.
        batch_size: pictures at a time and process; pictures of a batch are padded to a common size.
        workers: processes that load pictures.
        evaluator: which library counts.
        classwise: AP of every class too.
        save_to: JSON file for the predictions in COCO's result format.
        output: folder for the log.
        device, precision: where and how to run.
        progress: wraps the loop over pictures that are checked.

    Returns:
        Scores from 0 to 1 by name (`bbox_AP50`), and notes on the data.
    """
    opened = open_detector(weights, config=config, merged=False, image_size=image_size)
    described = _test_config(opened, paths, batch_size, workers)
    notes = use_scoring_data(described, "test", paths, opened.classes, progress)
    described.test_evaluator.update(
        evaluator=evaluator, classwise=classwise, save_to=None if save_to is None else str(save_to)
    )

    def prepare(model: Any) -> None:
        load_weights(model, weights)
        prepare_for_inference(model, merged=merged)

    scores = runner.evaluate(described, output=output, prepare=prepare, device=device, precision=precision)
    return {name.removeprefix("coco/"): value for name, value in scores.items()}, notes


def score_file(
    predictions: str | Path,
    annotations: str | Path,
    kinds: list[Kind] | None = None,
    evaluator: Evaluator = "pycocotools",
) -> dict[str, float]:
    """Scores of a JSON file of predictions: COCO's result list, or `predictions.json` of `detect predict`.

    Args:
        predictions: the file.
        annotations: COCO file to compare with.
        kinds: what to score; None for boxes, and masks where the predictions have them.
        evaluator: which library counts.

    Raises:
        UsageError: no such file.
        RunError: not such predictions, or of pictures that the annotations do not have.
    """
    truth = CheckedCoco(annotations)
    found = _read_results(Path(predictions), truth)
    known = set(truth.getImgIds())
    if strange := {result["image_id"] for result in found} - known:
        raise RunError(f"{predictions} has pictures that {annotations} does not have: ids {sorted(strange)[:5]}")
    if kinds is None:
        kinds = ["bbox", "segm"] if found and all("segmentation" in result for result in found) else ["bbox"]
    scores: dict[str, float] = {}
    for kind in kinds:
        if kind == "segm":
            require_masks(truth.found)
        averages, _ = average_precision(truth, found, kind, evaluator=evaluator)
        scores |= {f"{kind}_{name}": value for name, value in averages.items()}
    return scores


def _read_results(path: Path, truth: CheckedCoco) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UsageError(f"there is no file of predictions {path}")
    try:
        contents = json.loads(path.read_bytes())
    except ValueError as error:
        raise RunError(f"{path} is not JSON: {error}") from error
    found = contents.get("annotations") if isinstance(contents, dict) else contents
    needed = {"image_id", "category_id", "bbox", "score"}
    if not isinstance(found, list) or not all(isinstance(entry, dict) and needed <= entry.keys() for entry in found):
        raise RunError(f"{path} is not COCO's result format: a list of {', '.join(sorted(needed))}")
    return found if isinstance(contents, list) else _renumbered(contents, found, truth, path)


def _renumbered(contents: dict[str, Any], found: list[Any], truth: CheckedCoco, path: Path) -> list[dict[str, Any]]:
    """Results of `detect predict` under the ids of `truth`: its pictures by file name, its categories by name."""
    by_name: dict[str, int] = {}
    for image in truth.dataset["images"]:
        by_name[Path(image["file_name"]).name] = image["id"]
    if len(by_name) < len(truth.dataset["images"]):
        raise UsageError(
            f"{truth.found.path} has pictures of the same name in several folders: score a list of results"
        )
    images = {image["id"]: by_name.get(Path(image["file_name"]).name) for image in contents.get("images", [])}
    names = {category["id"]: category["name"] for category in contents.get("categories", [])}
    ids = truth.found.category_ids
    if unknown := [image["file_name"] for image in contents.get("images", []) if images[image["id"]] is None]:
        raise RunError(f"{path} has pictures that {truth.found.path} does not have: {', '.join(unknown[:3])}")
    return [
        {**entry, "image_id": images[entry["image_id"]], "category_id": ids[names[entry["category_id"]]]}
        for entry in found
        if names.get(entry["category_id"]) in ids
    ]


def _test_config(opened: OpenedDetector, paths: DataPaths, batch_size: int, workers: int) -> Config:
    """The detector's config with a test loop over the data, whatever its own was."""
    config = opened.config
    dataset: Any = (config.get("test_dataloader") or {}).get("dataset") or {}
    pipeline = config.get("test_pipeline") or dataset["pipeline"]
    kinds = ["bbox", "segm"] if has_masks(config) else ["bbox"]
    # COCO's own places below --data, where the config names none.
    ann_file = dataset.get("ann_file", "annotations/instances_val2017.json")
    prefix = dataset.get("data_prefix", {"img": "val2017/"})
    made = {
        "default_scope": "mmdet",
        "model": config.model,
        "test_cfg": {"type": "TestLoop"},
        "test_dataloader": {
            "batch_size": batch_size,
            "num_workers": workers,
            "persistent_workers": False,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "dataset": {
                "type": "CocoPictures",
                "data_root": paths.root or dataset.get("data_root", ""),
                "ann_file": ann_file,
                "data_prefix": prefix,
                "test_mode": True,
                "pipeline": pipeline,
            },
        },
        "test_evaluator": {"type": "CocoScores", "ann_file": "", "metric": kinds},
        "custom_hooks": [{"type": "Float32Boxes"}],
        "log_level": "INFO",
        # mmengine's default is the second of the clock, which two scorings may share.
        "experiment_name": f"detect-eval-{uuid.uuid4().hex[:8]}",
    }
    made["model"]["backbone"] = {**config.model.backbone, "init_cfg": None}
    return Config(ConfigDict(made))
