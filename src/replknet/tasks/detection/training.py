"""A config made ready for one's data and budget: where the data lie, which classes they have, if they are whole."""

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import set_random_seed

from replknet._errors import RunError, UsageError
from replknet.tasks.detection.annotations import (
    Annotations,
    PictureCheck,
    Progress,
    check_classes,
    check_pictures,
    choose_classes,
    read_annotations,
    require_masks,
)
from replknet.tasks.detection.detector import has_masks, resize_test, scaled, set_classes
from replknet.tasks.openmmlab.runner import Precision, train


@dataclass(frozen=True)
class DataPaths:
    """Where data lie, instead of where the config says.

    Attributes:
        root: folder in which the config's own relative paths are looked up.
        train_annotations, train_images: COCO file and folder of pictures to learn from.
        val_annotations, val_images: likewise for scoring; without them and with `train_annotations`, nothing is scored.
        classes: to learn; None for all categories of the training file.
        keep_empty: learn from pictures without boxes too.
        check: how closely pictures are looked at first.
    """

    root: str | None = None
    train_annotations: str | None = None
    train_images: str | None = None
    val_annotations: str | None = None
    val_images: str | None = None
    classes: list[str] | None = None
    keep_empty: bool = False
    check: PictureCheck = "headers"


def train_detector(
    config: Config,
    paths: DataPaths,
    *,
    output: str | Path,
    weights: str | Path | None = None,
    backbone: str | None = None,
    resume: bool = False,
    seed: int = 0,
    device: str = "auto",
    precision: Precision | None = None,
    on_notes: Callable[[list[str]], None] | None = None,
    progress: Progress | None = None,
) -> None:
    """Check the data, then train; under torchrun, as one of several processes.

    Args:
        config: a recipe; changed.
        paths: where the data lie.
        output: folder for checkpoints and logs.
        weights: a whole detector to start from; layers whose shape depends on the classes may be of other classes.
        backbone: weights of the backbone instead of the config's; "none" for random ones.
        resume: go on from the last checkpoint in `output`.
        seed: of all random numbers.
        device: "auto", "cpu", "cuda", "cuda:1".
        precision: of convolutions and linear layers.
        on_notes: is told what is odd about the data.
        progress: wraps the loop over pictures that are checked.
    """
    notes = use_training_data(config, paths, progress)
    if on_notes is not None:
        on_notes(notes)
    # mmengine's default is the second of the clock, which two trainings may share.
    config.setdefault("experiment_name", f"detect-train-{uuid.uuid4().hex[:8]}")
    if weights is not None or backbone == "none":
        config.model.backbone.init_cfg = None
    elif backbone is not None:
        config.model.backbone.init_cfg = {"type": "Pretrained", "checkpoint": backbone}
    train(
        config,
        output=output,
        weights=weights,
        may_differ=class_layers(config),
        resume=resume,
        device=device,
        precision=precision,
        seed=seed,
    )


def class_layers(config: Config) -> tuple[str, ...]:
    """Names of the layers whose shape depends on the number of classes."""
    stages = range((config.model.get("roi_head") or {}).get("num_stages", 1))
    boxes = [f"roi_head.bbox_head.{stage}.{layer}" for stage in stages for layer in ("fc_cls", "fc_reg")]
    masks = [f"roi_head.mask_head.{stage}.conv_logits" for stage in stages]
    return ("bbox_head.conv_cls", *boxes, *masks)


def use_training_data(config: Config, paths: DataPaths, progress: Progress | None = None) -> list[str]:
    """Point `config` to the data, give its heads the data's classes, and check all of it.

    Returns:
        Notes: what is odd and does not hinder.

    Raises:
        UsageError: files or pictures that are missing, classes that do not fit, a set without boxes.
        RunError: a broken annotation file, pictures that cannot be read or have another size.
    """
    annotations, images = _locate(config, "train", paths)
    train = read_annotations(annotations)
    classes = choose_classes(train, paths.classes)
    _require_boxes(train, classes)
    if has_masks(config):
        require_masks(train)
    check_pictures(train, images, paths.check, progress)
    _set_dataset(config.train_dataloader.dataset, annotations, images, classes)
    if paths.keep_empty:
        config.train_dataloader.dataset.filter_cfg.filter_empty_gt = False
    set_classes(config, len(classes))
    notes = [*train.notes, *_too_small(config, train)]
    if paths.train_annotations is not None and paths.val_annotations is None:
        drop_validation(config)
        return notes
    return notes + use_scoring_data(config, "val", paths, classes, progress)


def use_scoring_data(
    config: Config, which: str, paths: DataPaths, classes: Sequence[str], progress: Progress | None = None
) -> list[str]:
    """Point the loader and evaluator `which` ("val" or "test") to the data, check these, and return notes.

    Raises:
        UsageError, RunError: as for `use_training_data`.
    """
    annotations, images = _locate(config, which, paths)
    found = read_annotations(annotations)
    check_classes(found, classes, "the model" if which == "test" else "the training set")
    _require_boxes(found, classes)
    evaluator = config[f"{which}_evaluator"]
    kinds = evaluator.get("metric", "bbox")
    if "segm" in ([kinds] if isinstance(kinds, str) else kinds):
        require_masks(found)
    check_pictures(found, images, paths.check, progress)
    _set_dataset(config[f"{which}_dataloader"].dataset, annotations, images, classes)
    evaluator.ann_file = str(annotations)
    return found.notes


def drop_validation(config: Config) -> None:
    """Train without scoring."""
    for key in ("val_dataloader", "val_evaluator", "val_cfg", "test_dataloader", "test_evaluator", "test_cfg"):
        config.pop(key, None)
    for key in ("save_best", "rule"):
        config.default_hooks.checkpoint.pop(key, None)


def set_schedule(
    config: Config,
    *,
    epochs: int | None = None,
    warmup: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    image_size: int | None = None,
    validate_every: int | None = None,
) -> None:
    """Change the size of a training and keep its shape.

    Args:
        config: of an epoch-based training; changed.
        epochs: in all; the steps of the learning rate move in proportion.
        warmup: iterations over which the learning rate rises.
        lr: learning rate.
        batch_size: pictures a step and process.
        workers: processes that load pictures, per process.
        image_size: short side of test pictures; all sizes and crops of the training pictures change in proportion.
        validate_every: epochs between two scorings.

    Raises:
        UsageError: a number out of range, or a config without what it would change.
    """
    for name, value, least in (("epochs", epochs, 1), ("batch_size", batch_size, 1), ("workers", workers, 0)):
        if value is not None and value < least:
            raise UsageError(f"{name} {value}: give {least} or more")
    if lr is not None:
        config.optim_wrapper.optimizer.lr = lr
    if epochs is not None:
        _set_epochs(config, epochs)
    if warmup is not None:
        for scheduler in config.param_scheduler:
            if not scheduler.get("by_epoch", True):
                scheduler.end = warmup + 1
        if warmup == 0:
            config.param_scheduler = [s for s in config.param_scheduler if s.get("by_epoch", True)]
    if validate_every is not None:
        config.train_cfg.val_interval = validate_every
    if batch_size is not None:
        config.train_dataloader.batch_size = batch_size
    if workers is not None:
        for loader in _loaders(config):
            loader.num_workers = workers
            loader.persistent_workers = workers > 0
    if image_size is not None:
        _scale_pictures(config, image_size)


@HOOKS.register_module()
class EpochSeeds(Hook):
    """Start every epoch from a seed of its own, so that a resumed training draws what an uninterrupted one would.

    Without loader workers (`num_workers=0`) it then ends with the same bits; workers of their own draw other crops and
    flips after a resume.
    """

    def before_train_epoch(self, runner: Any) -> None:
        """Seed Python's, NumPy's and torch's generators."""
        set_random_seed((runner.seed + runner.epoch) % 2**32, diff_rank_seed=True)


def _set_epochs(config: Config, epochs: int) -> None:
    before = config.train_cfg.get("max_epochs")
    if before is None:
        raise UsageError("epochs: the config trains by iterations; set them with --cfg_options train_cfg.max_iters=N")
    config.train_cfg.max_epochs = epochs
    for scheduler in config.param_scheduler:
        if not scheduler.get("by_epoch", True):
            continue
        if "end" in scheduler:
            scheduler.end = epochs
        if "milestones" in scheduler:
            scheduler.milestones = [max(1, round(step * epochs / before)) for step in scheduler.milestones]


def _scale_pictures(config: Config, image_size: int) -> None:
    before = min(next(s["scale"] for s in config.test_pipeline if s["type"] == "Resize"))
    resize_test(config, image_size)
    for step in _steps(config.train_dataloader.dataset.pipeline):
        if "scales" in step:
            step["scales"] = [scaled(scale, image_size / before) for scale in step["scales"]]
        elif step["type"] == "Resize":
            step["scale"] = scaled(step["scale"], image_size / before)
        elif "crop_size" in step:
            step["crop_size"] = scaled(step["crop_size"], image_size / before)


def _steps(pipeline: Sequence[Any]) -> Iterator[Any]:
    """Every step of a pipeline, those inside choices too."""
    for step in pipeline:
        if step["type"] == "RandomChoice":
            for branch in step["transforms"]:
                yield from _steps(branch)
        else:
            yield step


def _loaders(config: Config) -> Iterator[Any]:
    for name in ("train", "val", "test"):
        if loader := config.get(f"{name}_dataloader"):
            yield loader


def _locate(config: Config, which: str, paths: DataPaths) -> tuple[Path, Path]:
    """Annotation file and picture folder of a loader: as asked for, else the config's below the data root."""
    own = "train" if which == "train" else "val"
    asked = (getattr(paths, f"{own}_annotations"), getattr(paths, f"{own}_images"))
    if any(asked):
        if not all(asked):
            raise UsageError(f"{own}_annotations and {own}_images belong together: give both")
        return Path(asked[0]).expanduser(), Path(asked[1]).expanduser()
    dataset = (config.get(f"{which}_dataloader") or {}).get("dataset")
    if dataset is None or "ann_file" not in dataset:
        raise UsageError(f"the config's {which}_dataloader has no data set with ann_file; give the paths as options")
    root = Path(paths.root or dataset.get("data_root") or "").expanduser()
    if not root.is_dir():
        raise UsageError(
            f"there is no data folder {root}; give COCO's folder with --data, or your own files with "
            f"--{own}_annotations and --{own}_images"
        )
    return root / dataset["ann_file"], root / (dataset.get("data_prefix") or {}).get("img", "")


def _set_dataset(dataset: Any, annotations: Path, images: Path, classes: Sequence[str]) -> None:
    dataset.update(
        data_root="",
        ann_file=str(annotations),
        data_prefix={"img": str(images)},
        metainfo={"classes": tuple(classes)},
    )


def _require_boxes(found: Annotations, classes: Sequence[str]) -> None:
    ids = {found.category_ids[name] for name in classes}
    if not any(annotation["category_id"] in ids for annotation in found.dataset["annotations"]):
        raise UsageError(f"{found.path} has no boxes of the classes {', '.join(classes[:5])}")


def _too_small(config: Config, found: Annotations) -> list[str]:
    least = (config.train_dataloader.dataset.get("filter_cfg") or {}).get("min_size", 0)
    small = [image for image in found.dataset["images"] if min(image["width"], image["height"]) < least]
    if len(small) == len(found.dataset["images"]):
        raise RunError(f"{found.path}: every picture is smaller than {least} pixels, the config's filter_cfg.min_size")
    if not small:
        return []
    return [f"{found.path}: {len(small)} pictures smaller than {least} pixels are left out of training"]
