"""Folder layouts of data sets: what belongs where, what is missing, and whether label maps fit their pictures."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from replknet._errors import RunError, UsageError
from replknet._files import replacing
from replknet.data.folders import find_pictures
from replknet.data.images import load_image
from replknet.tasks.segmentation.folder_dataset import CLASS_LIST, find_pairs, read_classes
from replknet.tasks.segmentation.labels import IGNORED, check_size, check_values, read_labels, reduce_zero

Kind = Literal["folder", "ade20k", "cityscapes"]

CITYSCAPES_TRAIN_IDS = {
    label: train_id
    for train_id, label in enumerate((7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33))
}
"""Label id to training id; every other id is ignored. Source: labels.py of github.com/mcordts/cityscapesScripts."""

_ADE = {"train": "training", "val": "validation"}


@dataclass
class LayoutReport:
    """What a check of one split found."""

    split: str
    pictures: int
    pixels: Counter[int] = field(default_factory=Counter)
    """Labelled pixels a class, as training counts classes; `IGNORED` for the rest."""
    problems: list[str] = field(default_factory=list)

    def unused(self, classes: int) -> list[int]:
        """Classes that no pixel has."""
        return [label for label in range(classes) if not self.pixels[label]]


def check_layout(kind: Kind, root: Path, split: str, *, every: int = 1, workers: int = 4) -> LayoutReport:
    """Read every picture and label map of one split and hold them against each other and the class list.

    Args:
        kind: "ade20k" (`images/training`, `annotations/training`, ...), "cityscapes" (`leftImg8bit/train/CITY`,
            `gtFine/train/CITY`), or "folder".
        root: of the data set.
        split: "train" or "val".
        every: check each so manieth pair only.
        workers: threads that read.

    Raises:
        UsageError: a folder or label map is missing (up to five are named), or no pictures.
    """
    pairs, classes, reduce = find_layout(kind, root, split)
    chosen = pairs[::every]
    report = LayoutReport(split, len(pairs))
    with ThreadPoolExecutor(workers) as pool:
        for found in pool.map(partial(_check_pair, classes=classes, reduce=reduce), chosen):
            if isinstance(found, str):
                report.problems.append(found)
            else:
                report.pixels.update(found)
    return report


def find_layout(kind: Kind, root: Path, split: str) -> tuple[list[tuple[Path, Path]], int, bool]:
    """Pairs of pictures and label maps, the number of classes, and whether label 0 means ignored.

    Raises:
        UsageError: as `check_layout`.
    """
    if not root.is_dir():
        raise UsageError(f"there is no folder {root}")
    if split not in _ADE:
        raise UsageError(f"unknown split {split!r}; known: {', '.join(_ADE)}")
    if kind == "folder":
        return find_pairs(root, split), len(read_classes(root / CLASS_LIST)[0]), False
    if kind == "ade20k":
        images, labels = root / "images" / _ADE[split], root / "annotations" / _ADE[split]
        return _pairs(images, labels, ".jpg", ".png"), 150, True
    images, labels = root / "leftImg8bit" / split, root / "gtFine" / split
    pairs = _pairs(images, labels, "_leftImg8bit.png", "_gtFine_labelTrainIds.png", " (`replknet segment prepare`)")
    return pairs, 19, False


def write_train_ids(root: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Write Cityscapes' `*_gtFine_labelTrainIds.png` beside every `*_gtFine_labelIds.png` below `root/gtFine`.

    Args:
        root: holds `gtFine`.
        overwrite: write those again that are there.

    Returns:
        The files written, as they are.

    Raises:
        UsageError: no such files.
        RunError: one that cannot be read.
    """
    sources = sorted((root / "gtFine").rglob("*_gtFine_labelIds.png"))
    if not sources:
        raise UsageError(f"there are no *_gtFine_labelIds.png below {root / 'gtFine'}")
    table = np.full(256, IGNORED, np.uint8)
    for label, train_id in CITYSCAPES_TRAIN_IDS.items():
        table[label] = train_id
    for source in sources:
        target = source.with_name(source.name.replace("_labelIds", "_labelTrainIds"))
        if target.exists() and not overwrite:
            continue
        with replacing(target) as temporary:
            Image.fromarray(table[read_labels(source)]).save(temporary, "PNG")
        yield target


def _pairs(images: Path, labels: Path, suffix: str, label_suffix: str, hint: str = "") -> list[tuple[Path, Path]]:
    for folder in (images, labels):
        if not folder.is_dir():
            raise UsageError(f"there is no folder {folder}")
    pictures = [path for path in find_pictures(images) if path.name.endswith(suffix)]
    if not pictures:
        raise UsageError(f"no pictures *{suffix} in {images}")
    pairs = []
    for picture in pictures:
        name = picture.name.removesuffix(suffix) + label_suffix
        pairs.append((picture, labels / picture.relative_to(images).with_name(name)))
    if missing := [str(label) for _, label in pairs if not label.is_file()]:
        more = ", ..." if len(missing) > 5 else ""
        raise UsageError(f"{len(missing)} of {len(pairs)} label maps are missing{hint}: {', '.join(missing[:5])}{more}")
    return pairs


def _check_pair(pair: tuple[Path, Path], *, classes: int, reduce: bool) -> dict[int, int] | str:
    """Pixels a label, or what is wrong."""
    picture, path = pair
    try:
        image = load_image(picture)
        labels = read_labels(path)
        check_size(labels, path, picture, (image.height, image.width))
        labels = reduce_zero(labels) if reduce else labels
        check_values(labels, path, classes)
    except RunError as error:
        return str(error)
    values, counts = np.unique(labels, return_counts=True)
    return {int(value): int(count) for value, count in zip(values, counts, strict=True)}
