"""Training and scoring on one's own pictures: a folder of images, a folder of label maps and a list of classes."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from replknet._errors import UsageError
from replknet.data.folders import find_pictures

CLASS_LIST = "classes.txt"
_COLOR = re.compile(r"^(.*?)\s+(\d{1,3})[ ,]+(\d{1,3})[ ,]+(\d{1,3})$")


@DATASETS.register_module()
class SegmentationFolder(BaseSegDataset):
    """`images/SPLIT/NAME.jpg` with `labels/SPLIT/NAME.png` and `classes.txt`, one class a line in the order of labels.

    A line may end in a colour: `road 128 64 128`. Label maps hold class numbers from 0, 255 is ignored. Pictures may
    lie in subfolders, which label maps repeat.

    Args:
        data_root: the folder.
        split: "train" or "val"; folders `images` and `labels` without such subfolders serve every split.
        reduce_zero_label: labels start at 1, 0 is ignored; the class list then starts with label 1.
        options: of `BaseSegDataset`.

    Raises:
        UsageError: a folder or the class list missing, a picture without label map, no pictures.
    """

    def __init__(self, data_root: str, split: str = "train", reduce_zero_label: bool = False, **options: Any):
        self.split = split
        classes, palette = read_classes(Path(data_root) / CLASS_LIST)
        metainfo = {"classes": tuple(classes), "palette": palette or default_palette(len(classes))}
        super().__init__(data_root=data_root, metainfo=metainfo, reduce_zero_label=reduce_zero_label, **options)

    def load_data_list(self) -> list[dict]:
        """One dict a picture, in the order of names."""
        classes = len(self._metainfo["classes"])
        shared = {"label_map": None, "reduce_zero_label": self.reduce_zero_label, "num_classes": classes}
        pairs = find_pairs(Path(str(self.data_root)), self.split)
        return [{"img_path": str(i), "seg_map_path": str(m), "seg_fields": [], **shared} for i, m in pairs]


def read_classes(path: Path) -> tuple[list[str], list[list[int]]]:
    """Names in a class list, and their colours where every line has one.

    Raises:
        UsageError: no such file, an empty one, a name twice, or more than 255 names.
    """
    if not path.is_file():
        raise UsageError(f"there is no class list {path}: write one class a line, in the order of the labels")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    matches = [_COLOR.match(line) for line in lines]
    colored = bool(lines) and all(matches)
    names = [str(match[1]) for match in matches if match] if colored else lines
    if not names or len(names) > 255:
        raise UsageError(f"{path} lists {len(names)} classes; 1 to 255 are possible")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{path} lists {twice[0]!r} twice")
    return names, [[int(match[i]) for i in (2, 3, 4)] for match in matches if match] if colored else []


def default_palette(classes: int) -> list[list[int]]:
    """Pascal VOC's colours: distinct for 256 classes, class 0 black."""
    bits = (np.arange(classes)[:, None] >> np.arange(9)) & 1
    channels = [sum(bits[:, 3 * i + channel] << (7 - i) for i in range(3)) for channel in range(3)]
    return np.stack(channels, 1).tolist()


def find_pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    """Pictures and their label maps.

    Raises:
        UsageError: a folder is missing or empty, or a picture has no label map; up to five are named.
    """
    images, labels = _split_folder(root, "images", split), _split_folder(root, "labels", split)
    pictures = find_pictures(images)
    if not pictures:
        raise UsageError(f"no pictures in {images}")
    pairs = [(picture, labels / picture.relative_to(images).with_suffix(".png")) for picture in pictures]
    if missing := [str(label) for _, label in pairs if not label.is_file()]:
        raise UsageError(
            f"{len(missing)} of {len(pairs)} pictures in {images} have no label map: {', '.join(missing[:5])}"
            + (", ..." if len(missing) > 5 else "")
        )
    return pairs


def _split_folder(root: Path, kind: str, split: str) -> Path:
    if (root / kind / split).is_dir():
        return root / kind / split
    if (root / kind).is_dir() and not any((root / kind / name).is_dir() for name in ("train", "val")):
        return root / kind
    raise UsageError(
        f"there is no folder {root / kind / split}; needed are images/, labels/ and {CLASS_LIST} in {root}"
    )
