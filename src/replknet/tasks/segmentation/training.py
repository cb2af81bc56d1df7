"""A config made ready for one's data: where it lies, which classes it has, whether all of it is there."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from replknet._errors import UsageError
from replknet.tasks.segmentation.folder_dataset import find_pairs
from replknet.tasks.segmentation.segmentor import HEADS, dataset_meta

_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")


def use_data(config: Config, root: str | Path | None) -> None:
    """Point every data set of `config` to `root`, if given; check that it is there and fits the model.

    Heads that do not say their number of classes get the data set's.

    Raises:
        UsageError: a folder is missing, a picture lacks its label map, or the class counts differ.
    """
    for loader, dataset in datasets(config):
        if root is not None:
            dataset["data_root"] = str(root)
        _check_folders(loader, dataset)
    for _, dataset in datasets(config):
        if found := dataset_meta(dataset):
            _set_classes(config, len(found["classes"]), dataset)


def check_ready(config: Config, root: str | Path | None, device: str) -> None:
    """`use_data`, and a batch that the model's norms can take with the processes and device at hand."""
    use_data(config, root)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    if config.get("train_dataloader") is None:
        raise UsageError("the config has no train_dataloader")
    check_batch(config, processes, "cpu" if on_cpu else "cuda")


def datasets(config: Config) -> Iterator[tuple[str, Any]]:
    """The config's data sets with the name of their loader, wrappers such as `RepeatDataset` taken off."""
    for loader in _LOADERS:
        dataset = (config.get(loader) or {}).get("dataset")
        while dataset is not None and "dataset" in dataset:
            dataset = dataset["dataset"]
        if dataset is not None:
            yield loader, dataset


def check_batch(config: Config, processes: int, device: str) -> None:
    """Refuse one picture a process where norms see that picture alone: pooled to 1x1, it has no variance.

    Raises:
        UsageError: such a batch.
    """
    batch = config.train_dataloader.get("batch_size", 1)
    if batch == 1 and (processes == 1 or device == "cpu"):
        raise UsageError(
            "a batch of one picture cannot be normalised: set --cfg_options train_dataloader.batch_size=2 or more, or "
            "train on several GPUs with SyncBN"
        )


def _check_folders(loader: str, dataset: Any) -> None:
    root = Path(dataset.get("data_root") or ".")
    if not root.is_dir():
        raise UsageError(f"{loader}: there is no folder {root}; give the data set's folder by --data")
    if dataset["type"] == "SegmentationFolder":
        find_pairs(root, dataset.get("split", "train"))
        return
    for folder in (dataset.get("data_prefix") or {}).values():
        if folder and not (root / folder).is_dir():
            raise UsageError(
                f"{loader}: there is no folder {root / folder}; `replknet segment check` tells what is needed"
            )


def _set_classes(config: Config, classes: int, dataset: Any) -> None:
    for name in HEADS:
        head = config.model.get(name)
        for part in head if isinstance(head, (list, tuple)) else [head]:
            if part is None:
                continue
            if part.get("num_classes") is None:
                part["num_classes"] = classes
            if part["num_classes"] != classes:
                raise UsageError(
                    f"model.{name} has {part['num_classes']} classes, the data set {dataset['type']} in "
                    f"{dataset.get('data_root')} has {classes}: set --cfg_options model.{name}.num_classes={classes}"
                )
