"""COCO annotation files: read whole, checked, and said what is wrong with them.

What makes a file unusable is an error. What training can do without is a note: boxes without area or beyond the
picture, pictures without boxes.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from replknet._errors import RunError, UsageError
from replknet.data.images import BrokenImageError, load_image

PictureCheck = Literal["files", "headers", "full"]
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass
class Annotations:
    """The contents of a COCO file.

    Attributes:
        path: the file.
        dataset: `images`, `annotations`, `categories` as COCO has them; `area` and `iscrowd` filled in where missing.
        notes: what is odd and does not hinder, a line each.
    """

    path: Path
    dataset: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the categories in the order of their ids, as COCO's own classes are ordered."""
        return tuple(category["name"] for category in self._categories())

    @property
    def category_ids(self) -> dict[str, int]:
        """Name to id."""
        return {category["name"]: category["id"] for category in self._categories()}

    def _categories(self) -> list[dict[str, Any]]:
        return sorted(self.dataset["categories"], key=lambda category: category["id"])


def read_annotations(path: str | Path) -> Annotations:
    """Read a COCO instance file and check that its parts fit together.

    Raises:
        UsageError: there is no such file.
        RunError: not JSON, not COCO's layout, ids twice or of nothing, boxes that are not four numbers; the message
            names the file and the first entries concerned.
    """
    path = Path(path).expanduser()
    dataset = _load(path)
    _check_layout(dataset, path)
    images = _by_id(dataset["images"], "image", path)
    categories = _by_id(dataset["categories"], "category", path)
    _by_id(dataset["annotations"], "annotation", path)
    _check_images(images, path)
    _check_categories(categories, path)
    _check_references(dataset["annotations"], images, categories, path)
    _check_boxes(dataset["annotations"], path)
    for annotation in dataset["annotations"]:
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    return Annotations(path, dataset, _notes(dataset["annotations"], images, path))


def require_masks(found: Annotations) -> None:
    """Make sure that every annotation has an outline, which training and scoring of masks need.

    Raises:
        RunError: some have none; the message counts them and names the first.
    """
    bare = [a for a in found.dataset["annotations"] if not _has_mask(a.get("segmentation"))]
    if bare:
        raise RunError(
            f"{found.path}: {len(bare)} of {len(found.dataset['annotations'])} annotations have no usable "
            f"segmentation ({_some(bare)}), which instance segmentation needs; FCOS needs boxes only"
        )


def choose_classes(found: Annotations, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The classes to learn: those asked for, or all of the file.

    Raises:
        UsageError: a class that the file does not have, or none at all.
    """
    classes = found.classes if wanted is None else tuple(dict.fromkeys(wanted))
    if unknown := [name for name in classes if name not in found.classes]:
        raise UsageError(f"{found.path} has no category {', '.join(unknown)}; it has: {_listed(found.classes)}")
    if not classes:
        raise UsageError(f"{found.path}: no classes; name at least one")
    return classes


def check_classes(found: Annotations, classes: Sequence[str], of: str) -> None:
    """Make sure that every class of a model or of the training set is a category of this file.

    Args:
        found: the file.
        classes: names.
        of: what has these classes, for the message.

    Raises:
        UsageError: some are not; the message names them. Further categories of the file become a note.
    """
    missing = [name for name in classes if name not in found.category_ids]
    if missing:
        raise UsageError(
            f"{found.path} has no category {_listed(missing)}, which {of} has; its own are {_listed(found.classes)}. "
            "Names must be equal; list unused classes among the categories too"
        )
    if spare := [name for name in found.classes if name not in classes]:
        found.notes.append(f"{found.path}: left out, as {of} does not have it: {_listed(spare)}")


def check_pictures(
    found: Annotations, folder: str | Path, level: PictureCheck = "headers", progress: Progress | None = None
) -> None:
    """Make sure that the pictures of an annotation file are there and are what it says.

    Args:
        found: the file.
        folder: of the pictures.
        level: "files": every file exists; "headers": and has the size that the annotations name; "full": and decodes
            to its last byte.
        progress: wraps the loop over pictures.

    Raises:
        UsageError: no such folder, or missing files; the message counts them and names the first.
        RunError: pictures of another size, or that cannot be read; likewise.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UsageError(f"there is no folder of pictures {folder}, which {found.path} needs")
    images = found.dataset["images"]
    missing = [image["file_name"] for image in images if not (folder / image["file_name"]).is_file()]
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(images)} pictures of {found.path} are not in {folder}: {_listed(missing)}"
        )
    if level == "files":
        return
    problems = []
    for image in progress(images, "checking pictures") if progress else images:
        if problem := _picture_problem(image, folder / image["file_name"], level):
            problems.append(problem)
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise RunError(f"{found.path}: {'; '.join(problems[:3])}{more}")


def size_problem(name: str, size: tuple[int, int], wanted: tuple[int, int]) -> str | None:
    """Why a picture's width and height are not the annotated ones; None where they are."""
    if size == wanted:
        return None
    hint = " (rotated by its EXIF data? Save it upright)" if size == wanted[::-1] else ""
    return f"{name} is {size[0]}x{size[1]}, annotated as {wanted[0]}x{wanted[1]}{hint}"


def _picture_problem(image: dict[str, Any], path: Path, level: PictureCheck) -> str | None:
    try:
        if level == "full":
            size = load_image(path).size
        else:
            with Image.open(path) as picture:
                size = picture.size
    except BrokenImageError as error:
        return str(error)
    # Pillow raises whatever its parsers do.
    except Exception as error:  # noqa: BLE001
        reason = "not a picture in a known format" if "identify" in str(error) else str(error)
        return f"cannot read {path}: {reason}"
    return size_problem(str(path), size, (image["width"], image["height"]))


def _load(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name the annotation file in it")
    if not path.is_file():
        raise UsageError(f"there is no annotation file {path}")
    try:
        dataset = json.loads(path.read_bytes())
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is not JSON: not text in UTF-8") from error
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise RunError(f"{path} is not COCO's layout: nested too deeply") from error
    if not isinstance(dataset, dict):
        raise RunError(f"{path} is not COCO's layout: its top level is a {type(dataset).__name__}, not an object")
    return dataset


def _check_layout(dataset: dict[str, Any], path: Path) -> None:
    for key in ("images", "annotations", "categories"):
        entries = dataset.get(key)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            what = "has no" if key not in dataset else "has something else than a list of objects as"
            raise RunError(f"{path} is not COCO's layout for instances: it {what} {key!r}")
    for key in ("images", "categories"):
        if not dataset[key]:
            raise RunError(f"{path} lists no {key}")


def _by_id(entries: list[dict[str, Any]], kind: str, path: Path) -> dict[int, dict[str, Any]]:
    ids = [entry.get("id") for entry in entries]
    if bad := [value for value in ids if not isinstance(value, int) or isinstance(value, bool)]:
        raise RunError(f"{path}: {len(bad)} entries of kind {kind} have no whole number as id")
    if len(set(ids)) < len(ids):
        twice = [value for value, count in Counter(ids).items() if count > 1]
        raise RunError(f"{path}: {kind} ids stand there more than once: {_listed(twice)}")
    return {entry["id"]: entry for entry in entries}


def _check_images(images: dict[int, dict[str, Any]], path: Path) -> None:
    for key, entry in images.items():
        if not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
            raise RunError(f"{path}: image {key} has no file_name")
        size = [entry.get("width"), entry.get("height")]
        if not all(isinstance(side, int) and side > 0 for side in size):
            raise RunError(f"{path}: image {key} ({entry['file_name']}) has no valid width and height: {size}")


def _check_categories(categories: dict[int, dict[str, Any]], path: Path) -> None:
    names = [entry.get("name") for entry in categories.values()]
    if not all(isinstance(name, str) and name for name in names):
        raise RunError(f"{path}: a category has no name")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise RunError(f"{path}: categories of the same name: {_listed(twice)}")


def _check_references(annotations: list[dict], images: dict, categories: dict, path: Path) -> None:
    for key, known, what in (("image_id", images, "image"), ("category_id", categories, "category")):
        if lost := [a for a in annotations if not isinstance(a.get(key), int) or a[key] not in known]:
            values = _listed(dict.fromkeys(a.get(key) for a in lost))
            raise RunError(
                f"{path}: {len(lost)} annotations name no {what} of this file ({_some(lost)}; {key} {values})"
            )


def _check_boxes(annotations: list[dict], path: Path) -> None:
    def is_box(value: Any) -> bool:
        numbers = isinstance(value, list) and len(value) == 4 and all(isinstance(v, (int, float)) for v in value)
        return numbers and all(math.isfinite(v) for v in value)

    if bad := [a for a in annotations if not is_box(a.get("bbox"))]:
        raise RunError(
            f"{path}: {len(bad)} annotations have no bbox of four numbers x, y, width, height ({_some(bad)})"
        )


def _notes(annotations: list[dict], images: dict[int, dict], path: Path) -> list[str]:
    flat, outside, over = [], [], []
    for annotation in annotations:
        image = images[annotation["image_id"]]
        x, y, w, h = annotation["bbox"]
        inside = (min(x + w, image["width"]) - max(x, 0), min(y + h, image["height"]) - max(y, 0))
        if w < 1 or h < 1 or annotation["area"] <= 0:
            flat.append(annotation)
        elif min(inside) <= 0:
            outside.append(annotation)
        # COCO's own boxes reach over the edge by up to a pixel.
        elif x < -1 or y < -1 or x + w > image["width"] + 1 or y + h > image["height"] + 1:
            over.append(annotation)
    kinds = (
        (flat, "boxes without area, or smaller than a pixel, are left out of training"),
        (outside, "boxes lie outside their picture and are left out of training"),
        (over, "boxes reach over the edge of their picture and are cut there"),
    )
    notes = [f"{path}: {len(found)} {text} ({_some(found, images)})" for found, text in kinds if found]
    empty = len(images) - len({annotation["image_id"] for annotation in annotations})
    return notes + ([f"{path}: {empty} of {len(images)} pictures have no boxes"] if empty else [])


def _has_mask(segmentation: Any) -> bool:
    if isinstance(segmentation, dict):
        return "counts" in segmentation and "size" in segmentation
    # As MMDetection: parts of less than three points are passed over.
    parts = segmentation if isinstance(segmentation, list) else []
    return any(isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 for part in parts)


def _some(annotations: list[dict], images: dict[int, dict] | None = None) -> str:
    def name(annotation: dict) -> str:
        return f"annotation {annotation.get('id')}" + (
            f" in {images[annotation['image_id']]['file_name']}" if images else ""
        )

    return _listed([name(annotation) for annotation in annotations], 3)


def _listed(values: Iterable[Any], limit: int = 5) -> str:
    shown = [str(value) for value in values]
    return ", ".join(shown[:limit]) + (f", and {len(shown) - limit} more" if len(shown) > limit else "")
