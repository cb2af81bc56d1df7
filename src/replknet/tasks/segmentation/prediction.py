"""Segmented pictures as files: overlays, label maps with a palette, one JSON file."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from replknet._errors import UsageError
from replknet._files import replacing, write_text
from replknet.data.images import BrokenImageError, load_image
from replknet.tasks.segmentation.segmentor import OpenedSegmentor


@dataclass(frozen=True)
class FoundClass:
    """A class in a picture: its label, name, colour and share of the pixels."""

    label: int
    name: str
    color: tuple[int, int, int]
    share: float


@dataclass(frozen=True)
class Segmented:
    """One picture's result.

    Attributes:
        path: the picture.
        classes: found classes, largest first.
        size: height and width.
        labels: name of the label map beside the JSON file.
        overlay: name of the overlay.
        error: why the picture could not be read, or None.
    """

    path: Path
    classes: tuple[FoundClass, ...] = ()
    size: tuple[int, int] = (0, 0)
    labels: str = ""
    overlay: str = ""
    error: str | None = None


def predict_to_folder(
    opened: OpenedSegmentor, paths: Sequence[Path], folder: Path, opacity: float = 0.5
) -> Iterator[Segmented]:
    """Segment pictures one by one and write the files of each; `predictions.json` at the end.

    Args:
        opened: the segmentor.
        paths: pictures.
        folder: made if missing; files of the same names are replaced.
        opacity: of the colours over the picture.

    Raises:
        UsageError: `folder` is a file, or an opacity outside 0 to 1.
    """
    if not 0 <= opacity <= 1:
        raise UsageError(f"--opacity {opacity}: give 0 to 1")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder} is a file; give a folder")
    results = []
    for path, name in zip(paths, _names(paths), strict=True):
        result = _segment(opened, path, folder, name, opacity)
        results.append(result)
        yield result
    write_text(
        folder / "predictions.json", json.dumps(_described(opened, results), indent=1, ensure_ascii=False) + "\n"
    )


def save_labels(labels: np.ndarray, palette: Sequence[Sequence[int]], path: Path) -> None:
    """A label map as PNG whose pixel values are the labels, shown in the palette's colours up to 256 classes."""
    if len(palette) <= 256:
        image = Image.fromarray(labels.astype(np.uint8)).convert("L")
        image.putpalette([value for color in palette for value in color])
    else:
        image = Image.fromarray(labels.astype(np.uint16))
    with replacing(path) as temporary:
        image.save(temporary, "PNG")


def overlay(image: Image.Image, labels: np.ndarray, palette: Sequence[Sequence[int]], opacity: float) -> Image.Image:
    """The picture under the colours of its labels."""
    colors = np.asarray(palette, np.uint8)[labels]
    return Image.blend(image.convert("RGB"), Image.fromarray(colors), opacity)


def _segment(opened: OpenedSegmentor, path: Path, folder: Path, name: str, opacity: float) -> Segmented:
    try:
        image = load_image(path)
    except BrokenImageError as error:
        return Segmented(path, error=str(error))
    labels = opened.segment(image)
    files = f"{name}.labels.png", f"{name}.overlay.jpg"
    save_labels(labels, opened.palette, folder / files[0])
    with replacing(folder / files[1]) as temporary:
        overlay(image, labels, opened.palette, opacity).save(temporary, "JPEG", quality=92)
    return Segmented(path, _found(labels, opened), labels.shape, *files)  # type: ignore[arg-type]


def _found(labels: np.ndarray, opened: OpenedSegmentor) -> tuple[FoundClass, ...]:
    values, counts = np.unique(labels, return_counts=True)
    return tuple(
        FoundClass(int(v), opened.classes[v], tuple(opened.palette[v]), float(n / labels.size))  # type: ignore[arg-type]
        for n, v in sorted(zip(counts, values, strict=True), key=lambda pair: (-pair[0], pair[1]))
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """A file name without suffix for every picture, numbered where two would be the same."""
    taken: dict[str, int] = {}
    names = []
    for path in paths:
        number = taken[path.stem] = taken.get(path.stem, 0) + 1
        names.append(path.stem if number == 1 else f"{path.stem}-{number}")
    return names


def _described(opened: OpenedSegmentor, results: Sequence[Segmented]) -> dict[str, Any]:
    classes = [
        {"label": i, "name": n, "color": c} for i, (n, c) in enumerate(zip(opened.classes, opened.palette, strict=True))
    ]
    entries = []
    for result in results:
        if result.error is not None:
            entries.append({"image": str(result.path), "error": result.error})
            continue
        entry = {"image": str(result.path), "height": result.size[0], "width": result.size[1]}
        found = [{**asdict(item), "share": round(item.share, 6)} for item in result.classes]
        entries.append({**entry, "labels": result.labels, "overlay": result.overlay, "classes": found})
    return {"weights": opened.source, "precision": opened.precision, "classes": classes, "predictions": entries}
