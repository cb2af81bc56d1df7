"""A detector together with all that is needed to use it: pipeline, class names, category ids."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.registry import MODELS, TRANSFORMS
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from torch import nn

from replknet._errors import UsageError
from replknet.data.images import load_image
from replknet.layers import reparameterize
from replknet.tasks.detection.official import COCO_CATEGORY_IDS, coco_meta, official_config, official_detector
from replknet.tasks.detection.precision import keep_boxes_in_float32
from replknet.tasks.openmmlab.checkpoint_files import read_runner_checkpoint, weights_file
from replknet.tasks.openmmlab.configs import config_of_checkpoint
from replknet.tasks.openmmlab.runner import Precision, autocast, load_weights


@dataclass(frozen=True)
class Detections:
    """What a detector found in one picture, best first.

    Attributes:
        boxes: corners x1 y1 x2 y2 in pixels `[N, 4]`, float32.
        scores: `[N]`, from 0 to 1.
        labels: indices of classes `[N]`.
        masks: `[N, H, W]` bool, or None from a detector without masks.
        size: width and height of the picture.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, chosen: np.ndarray) -> "Detections":
        """Those that a mask or indices choose."""
        masks = None if self.masks is None else self.masks[chosen]
        return Detections(self.boxes[chosen], self.scores[chosen], self.labels[chosen], masks, self.size)


@dataclass(frozen=True)
class OpenedDetector:
    """A detector ready for use, in evaluation mode.

    Attributes:
        model: mmdet's detector.
        config: what it was built from.
        classes: names in the order of labels.
        category_ids: COCO ids of the classes in the data set it was trained on.
        pipeline: from `{"img": [H, W, 3] uint8, blue first}` to the model's input.
        device: of the model.
        precision: of the forward pass.
        source: where the weights come from.
    """

    model: nn.Module
    config: Config
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    pipeline: Compose
    device: torch.device
    precision: Precision
    source: str

    @torch.no_grad()
    def detect(
        self, picture: str | Path | np.ndarray, *, threshold: float = 0.0, classes: Sequence[str] | None = None
    ) -> Detections:
        """Objects in a picture of any size.

        Args:
            picture: a file, or pixels `[H, W, 3]` uint8, red first.
            threshold: least score.
            classes: names of the classes to keep; None for all.

        Raises:
            BrokenImageError: the file cannot be read as a picture.
            UsageError: a class that the detector does not know.
        """
        wanted = self.labels_of(classes)
        pixels = picture if isinstance(picture, np.ndarray) else np.asarray(load_image(picture))
        with detection_scope():
            batch = pseudo_collate([self.pipeline({"img": np.ascontiguousarray(pixels[:, :, ::-1]), "img_id": 0})])
        with autocast(self.device, self.precision):
            (sample,) = self.model.test_step(batch)  # type: ignore[operator]
        found = sample.pred_instances
        masks = found.masks.cpu().numpy() if "masks" in found else None
        height, width = pixels.shape[:2]
        every = Detections(
            found.bboxes.float().cpu().numpy(),
            found.scores.float().cpu().numpy(),
            found.labels.cpu().numpy(),
            masks,
            (width, height),
        )
        return every.take((every.scores >= threshold) & np.isin(every.labels, wanted))

    def labels_of(self, classes: Sequence[str] | None) -> list[int]:
        """Labels of named classes, all for None.

        Raises:
            UsageError: an unknown name.
        """
        if classes is None:
            return list(range(len(self.classes)))
        if unknown := [name for name in classes if name not in self.classes]:
            known = ", ".join(self.classes[:12]) + (", ..." if len(self.classes) > 12 else "")
            raise UsageError(f"{self.source} does not know the class {', '.join(unknown)}; it knows {known}")
        return [self.classes.index(name) for name in classes]


def open_detector(
    weights: str | Path | None = None,
    *,
    config: Config | None = None,
    merged: bool = True,
    image_size: int | None = None,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
) -> OpenedDetector:
    """Build a detector with its weights and find out how to feed it.

    Args:
        weights: name of official weights, an official file of the 2.x release, or a checkpoint of the Runner.
        config: what the weights were trained with; may be left out where the weights know it.
        merged: re-parameterise the backbone: same boxes, faster.
        image_size: short side to which pictures are resized, the long side limited in proportion; None as in the
            config.
        device: of the model.
        precision: of the forward pass.

    Raises:
        UsageError: neither weights nor config, or a request that the config cannot meet.
        RunError: weights that do not fit.
    """
    config, weights = resolve_config(weights, config)
    if image_size is not None:
        resize_test(config, image_size)
    stored = stored_classes(weights)
    if stored:
        set_classes(config, len(stored["classes"]))
    model = build_detector(config)
    if weights is not None:
        load_weights(model, weights)
    model = prepare_for_inference(model, merged=merged)
    classes, ids = _classes(config, stored, outputs_of(config))
    chosen = torch.device(device)
    source = "untrained" if weights is None else Path(weights).name
    return OpenedDetector(model.to(chosen), config, classes, ids, _pipeline(config), chosen, precision, source)


def resolve_config(weights: str | Path | None, config: Config | None) -> tuple[Config, str | Path | None]:
    """The config to use, and the weights; a given config wins over the weights' own.

    Raises:
        UsageError: the weights do not know their config and none was given.
    """
    entry = None if weights is None else official_detector(weights)
    if config is not None:
        return config, weights
    if weights is None:
        raise UsageError("give --weights (official weights' name, or a checkpoint) or --config")
    if entry is not None:
        return official_config(entry), weights
    return config_of_checkpoint(read_runner_checkpoint(weights_file(weights)), str(weights)), weights


def build_detector(config: Config) -> nn.Module:
    """The config's detector with random weights, in training mode, with plain batch norm for SyncBN.

    Raises:
        UsageError: the config holds no detector that can be built.
    """
    if "model" not in config:
        raise UsageError("the config has no model")
    described = copy.deepcopy(config.model)
    for key in ("init_cfg", "pretrained"):
        described.backbone.pop(key, None)
    try:
        with detection_scope():
            model = MODELS.build(described)
    except (KeyError, TypeError, AssertionError) as error:
        raise UsageError(f"the config's model cannot be built: {error.args[0] if error.args else error}") from error
    return keep_boxes_in_float32(revert_sync_batchnorm(model))


def prepare_for_inference(model: nn.Module, *, merged: bool = True) -> nn.Module:
    """In evaluation mode, and with the backbone re-parameterised if `merged`."""
    model = model.eval()
    if merged:
        model.backbone = reparameterize(model.backbone)  # type: ignore[arg-type, assignment]
    return model


@contextmanager
def detection_scope() -> Iterator[None]:
    """Inside, names in configs mean MMDetection's classes."""
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


def set_classes(config: Config, count: int) -> None:
    """Give every head of the config's model that predicts classes `count` of them."""
    model = config.model
    heads = [model.get("bbox_head")]
    roi = model.get("roi_head") or {}
    heads += [roi.get("bbox_head"), roi.get("mask_head")]
    for head in heads:
        for part in head if isinstance(head, (list, tuple)) else [head]:
            if part is not None and "num_classes" in part:
                part["num_classes"] = count


def has_masks(config: Config) -> bool:
    """Whether the config's detector predicts masks."""
    return "mask_head" in (config.model.get("roi_head") or {})


def resize_test(config: Config, short_side: int) -> None:
    """Let the test pipelines resize to this short side, their long side in proportion.

    Raises:
        UsageError: fewer than 32 pixels, or no resizing step in a pipeline.
    """
    if short_side < 32:
        raise UsageError(f"image_size {short_side}: give a short side of 32 pixels or more")
    pipelines = [config.get("test_pipeline")]
    for loader in ("val_dataloader", "test_dataloader"):
        pipelines.append(((config.get(loader) or {}).get("dataset") or {}).get("pipeline"))
    for pipeline in filter(None, pipelines):
        steps = [step for step in pipeline if step["type"] == "Resize"]
        if not steps:
            raise UsageError("image_size: the config's test pipeline has no step Resize")
        for step in steps:
            step["scale"] = scaled(step["scale"], short_side / min(step["scale"]))


def scaled(scale: Sequence[int], factor: float) -> tuple[int, int]:
    """A (width, height) limit times a factor."""
    return round(scale[0] * factor), round(scale[1] * factor)


def outputs_of(config: Config) -> int:
    """Classes that the config's detector tells apart."""
    roi = config.model.get("roi_head") or {}
    head = roi.get("bbox_head") or config.model.get("bbox_head")
    head = head[0] if isinstance(head, (list, tuple)) else head
    return int(head["num_classes"])


def stored_classes(weights: str | Path | None) -> dict[str, Any] | None:
    """Classes that a checkpoint of the Runner, or of MMDetection 2.x, names."""
    if weights is None:
        return None
    meta = read_runner_checkpoint(weights).get("meta") or {}
    found = meta.get("dataset_meta") or {"classes": meta.get("CLASSES")}
    return dict(found) if isinstance(found, Mapping) and found.get("classes") else None


def _classes(config: Config, stored: dict[str, Any] | None, outputs: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and category ids: the checkpoint's own, the config's, COCO's for 80 outputs, else numbers."""
    loader = config.get("train_dataloader") or config.get("test_dataloader") or {}
    configured = config.get("metainfo") or (loader.get("dataset") or {}).get("metainfo")
    coco = coco_meta() if outputs == len(COCO_CATEGORY_IDS) else None
    for found in (stored, configured, coco):
        if found and len(found.get("classes") or ()) == outputs:
            ids = found.get("category_ids")
            if ids is None and coco and list(found["classes"]) == coco["classes"]:
                ids = coco["category_ids"]
            return tuple(map(str, found["classes"])), tuple(ids or range(1, outputs + 1))
    return tuple(str(index) for index in range(outputs)), tuple(range(1, outputs + 1))


def _pipeline(config: Config) -> Compose:
    steps = config.get("test_pipeline")
    if steps is None:
        loader = config.get("test_dataloader") or config.get("val_dataloader") or {}
        steps = (loader.get("dataset") or {}).get("pipeline")
    if not steps:
        raise UsageError("the config has no test_pipeline")
    with detection_scope():
        return Compose([TRANSFORMS.build(step) for step in _from_memory(steps)])


def _from_memory(steps: Sequence[Any]) -> list[Any]:
    """The steps for a picture that is in memory already and has no annotations."""
    kept = []
    for step in steps:
        if step["type"] in ("LoadImageFromFile", "LoadPicture"):
            kept.append({"type": "mmdet.LoadImageFromNDArray"})
        elif "Annotations" in step["type"]:
            continue
        elif step["type"] == "PackDetInputs":
            keys = tuple(key for key in step.get("meta_keys", ()) if key not in ("img_path", "flip", "flip_direction"))
            kept.append({**step, "meta_keys": keys or ("img_id", "ori_shape", "img_shape", "scale_factor")})
        else:
            kept.append(dict(step))
    return kept
