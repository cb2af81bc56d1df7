"""Checkpoints of one's own, of MMDetection 2.x or without their config, as files that know all they need."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from replknet._errors import RunError, UsageError
from replknet._files import replacing
from replknet.layers import reparameterize
from replknet.tasks.detection.detector import build_detector, outputs_of, resolve_config, set_classes, stored_classes
from replknet.tasks.detection.official import coco_meta
from replknet.tasks.openmmlab.runner import load_weights


def convert(
    source: str | Path,
    target: str | Path,
    *,
    config: Config | None = None,
    classes: Sequence[str] | None = None,
    merged: bool = False,
    overwrite: bool = False,
) -> str:
    """Write a detector with its config and class names; `detect eval` and `predict` then need that file alone.

    Names of parameters are those of MMDetection 2.x and 3.x, which are the same; optimizer state is left out.

    Args:
        source: a checkpoint of MMDetection 2.x or 3.x, or official weights.
        target: file to write.
        config: what the weights were trained with, in the current form; may be left out for official weights and
            where the source knows it.
        classes: names in the order of labels, instead of the source's own.
        merged: re-parameterise the backbone: small kernels inside the large ones, as the release deploys.
        overwrite: replace an existing target.

    Returns:
        One line on what was done.

    Raises:
        UsageError: an existing target, no config, or another number of class names than the network has outputs.
        RunError: weights that do not fit the config.
    """
    source, target = Path(source), Path(target)
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists; choose another name or ask to overwrite it")
    config, weights = resolve_config(str(source), config)
    stored = stored_classes(weights)
    names: list[str] = list((stored or {}).get("classes") or ()) if classes is None else list(classes)
    if names:
        set_classes(config, len(names))
    detector = build_detector(config)
    assert weights is not None
    try:
        report = load_weights(detector, weights)
    except RunError as error:
        if classes is None:
            raise
        raise RunError(f"{error} ({len(names)} classes were named)") from error
    form = "train"
    if merged:
        reparameterize(detector.eval().backbone, fold_norms=False)  # type: ignore[arg-type]
        config.model.backbone.form = form = "merged"
    meta = _meta(names, stored, outputs_of(config))
    config.model.backbone.init_cfg = None
    contents = {"meta": {"cfg": config.pretty_text, "dataset_meta": meta}, "state_dict": detector.state_dict()}
    with replacing(target) as temporary:
        torch.save(contents, temporary)
    return f"{source} -> {target}: {len(report.matched)} tensors, {len(meta['classes'])} classes, {form} form"


def _meta(names: list[str], stored: dict[str, Any] | None, outputs: int) -> dict[str, Any]:
    coco = coco_meta()
    if not names:
        names = coco["classes"] if outputs == len(coco["classes"]) else [str(label) for label in range(outputs)]
    ids = (stored or {}).get("category_ids")
    if names == coco["classes"]:
        ids = coco["category_ids"]
    if ids is None or len(ids) != len(names):
        ids = list(range(1, len(names) + 1))
    return {"classes": tuple(names), "category_ids": list(ids)}
