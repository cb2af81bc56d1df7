"""Label maps: read and held against their pictures and classes before anything learns from them."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from mmcv.transforms import TRANSFORMS, BaseTransform
from PIL import Image, UnidentifiedImageError

from replknet._errors import RunError

IGNORED = 255
"""Label of pixels that neither training nor scores count."""


def read_labels(path: str | Path) -> np.ndarray:
    """A label map `[H, W]`, uint8: pixel values of a grey picture, indices of one with a palette.

    Raises:
        RunError: no such file, damaged, coloured, or with values above 255.
    """
    try:
        with Image.open(BytesIO(Path(path).read_bytes())) as image:
            mode, labels = image.mode, np.asarray(image)
    except FileNotFoundError as error:
        raise RunError(f"there is no label map {path}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise RunError(f"label map {path} cannot be read: {error}") from error
    if labels.ndim != 2:
        raise RunError(
            f"label map {path} is a picture of mode {mode}, {labels.shape[2]} channels; labels are one number a pixel "
            "(mode L or P)"
        )
    if labels.dtype != np.uint8:
        labels = labels.astype(np.int64)
        if labels.min() < 0 or labels.max() > IGNORED:
            raise RunError(f"label map {path} holds values up to {labels.max()}; labels are 0 to 254, and 255 ignored")
    return labels.astype(np.uint8)


def check_values(labels: np.ndarray, path: str | Path, classes: int, *, ignore: int = IGNORED) -> None:
    """Raise RunError unless all labels are below `classes` or `ignore`; the message says what shifted them if it can.

    Args:
        labels: as the loss sees them, after reduction of label zero.
        path: for the message.
    """
    present = np.unique(labels)
    wrong = [int(value) for value in present if value >= classes and value != ignore]
    if not wrong:
        return
    hint = ""
    if wrong == [classes]:
        hint = "; if labels start at 1, set reduce_zero_label=True"
    elif len(wrong) > 8:
        hint = "; are these colours or grey values instead of class numbers?"
    shown = ", ".join(map(str, wrong[:6])) + (", ..." if len(wrong) > 6 else "")
    raise RunError(f"label map {path} holds {shown}, the class list has {classes} (0 to {classes - 1}, {ignore}){hint}")


def check_size(labels: np.ndarray, path: str | Path, picture: str | Path, size: Sequence[int]) -> None:
    """Raise RunError unless the label map is as large as its picture; `size` is the picture's (height, width)."""
    if tuple(labels.shape) != tuple(size):
        height, width = labels.shape
        raise RunError(f"label map {path} is {height}x{width}, its picture {picture} is {size[0]}x{size[1]}")


def reduce_zero(labels: np.ndarray) -> np.ndarray:
    """Label 0 to 255 (ignored) and all others one down, 255 stays: how ADE20K's files count."""
    return np.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1).astype(np.uint8)


@TRANSFORMS.register_module()
class LoadCheckedAnnotations(BaseTransform):
    """MMSegmentation's `LoadAnnotations` that refuses maps of another size, and values beyond the class list.

    Reads `seg_map_path`, `ori_shape`, `label_map`, `reduce_zero_label` and `num_classes`; writes `gt_seg_map`
    `[H, W]` uint8.

    Args:
        num_classes: length of the class list, where the data set does not tell it.
    """

    def __init__(self, num_classes: int | None = None):
        self.num_classes = num_classes

    def transform(self, results: dict) -> dict:
        """Raise RunError where the label map does not fit."""
        path = results["seg_map_path"]
        labels = read_labels(path)
        check_size(labels, path, results["img_path"], results["ori_shape"])
        if results.get("reduce_zero_label"):
            labels = reduce_zero(labels)
        if results.get("label_map") is not None:
            table = np.arange(256, dtype=np.uint8)
            for old, new in results["label_map"].items():
                table[old] = new
            labels = table[labels]
        if classes := results.get("num_classes") or self.num_classes:
            check_values(labels, path, classes)
        results["gt_seg_map"] = labels
        results["seg_fields"].append("gt_seg_map")
        return results
