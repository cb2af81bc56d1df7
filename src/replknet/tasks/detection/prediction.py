"""Objects in pictures, folders and videos: drawings, and one file in COCO's format."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as run_lengths

from replknet._errors import RunError, UsageError
from replknet._files import replacing, write_text
from replknet.data.images import BrokenImageError, load_image
from replknet.tasks.detection.detector import Detections, OpenedDetector
from replknet.tasks.detection.drawing import draw

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
JSON_NAME = "predictions.json"


@dataclass
class Report:
    """What a prediction has written.

    Attributes:
        objects: found in all.
        pictures: read, frames of videos among them.
        written: drawings and the JSON file.
        errors: inputs that could not be read.
    """

    objects: int = 0
    pictures: int = 0
    written: list[Path] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def is_video(path: Path) -> bool:
    """By suffix, whatever its case."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def predict(
    detector: OpenedDetector,
    paths: Sequence[Path],
    output: str | Path,
    *,
    threshold: float = 0.3,
    classes: Sequence[str] | None = None,
    drawings: bool = True,
    on_picture: Callable[[str, Detections], None] | None = None,
    progress: Callable[[Any, str, int | None], Any] | None = None,
) -> Report:
    """Find objects in every input; what cannot be read is reported, and the others go on.

    Args:
        detector: opened.
        paths: pictures and videos.
        output: folder for drawings (under the inputs' names) and `predictions.json`.
        threshold: least score.
        classes: names of the classes to keep; None for all.
        drawings: write drawings too.
        on_picture: is told each picture's name and what is in it.
        progress: wraps the loops: items, what they are, how many (None where unknown).

    Raises:
        UsageError: a threshold out of range, an unknown class, an output that cannot be written.
    """
    if not 0 <= threshold <= 1:
        raise UsageError(f"score_threshold {threshold}: give a number from 0 to 1")
    detector.labels_of(classes)
    folder = _folder(Path(output))
    report, results = Report(), _Results(detector)
    names = _unique_names(paths)
    wrap = progress or (lambda items, _what, _total: items)
    options: dict[str, Any] = {"threshold": threshold, "classes": classes}
    for path in wrap(paths, "pictures", len(paths)):
        try:
            if is_video(path):
                target = folder / names[path] if drawings else None
                for index, found in enumerate(wrap(_video(detector, path, target, options), path.name, None)):
                    results.add(str(path), found, frame=index)
                    _tell(on_picture, f"{path} frame {index}", found)
            else:
                pixels = np.asarray(load_image(path))
                found = detector.detect(pixels, **options)
                target = folder / names[path] if drawings else None
                if target is not None:
                    with replacing(target) as temporary:
                        image = Image.fromarray(draw(pixels, found, detector.classes))
                        image.save(temporary, "PNG" if target.suffix == ".png" else "JPEG", quality=92)
                results.add(str(path), found)
                _tell(on_picture, str(path), found)
        except (BrokenImageError, RunError) as error:
            report.errors.append(str(error))
            continue
        if target is not None:
            report.written.append(target)
    report.pictures, report.objects = len(results.images), len(results.annotations)
    write_text(folder / JSON_NAME, json.dumps(results.as_coco()))
    report.written.append(folder / JSON_NAME)
    return report


class _Results:
    """Detections as a COCO data set, whose annotations have scores: pycocotools reads it as either."""

    def __init__(self, detector: OpenedDetector):
        self._detector = detector
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, name: str, found: Detections, frame: int | None = None) -> None:
        """Add a picture, or a frame of a video, and what is in it."""
        width, height = found.size
        image = {"id": len(self.images) + 1, "file_name": name, "width": width, "height": height}
        self.images.append(image if frame is None else {**image, "frame": frame})
        for index in range(len(found)):
            x1, y1, x2, y2 = found.boxes[index].astype(float).tolist()
            annotation = {
                "id": len(self.annotations) + 1,
                "image_id": image["id"],
                "category_id": self._detector.category_ids[int(found.labels[index])],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
                "score": float(found.scores[index]),
            }
            if found.masks is not None:
                encoded: Any = run_lengths.encode(np.asfortranarray(found.masks[index].astype(np.uint8)))
                annotation["segmentation"] = {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}
                annotation["area"] = float(run_lengths.area(encoded))
            self.annotations.append(annotation)

    def as_coco(self) -> dict[str, Any]:
        """Images, categories and annotations."""
        names = zip(self._detector.category_ids, self._detector.classes, strict=True)
        categories = [{"id": number, "name": name} for number, name in names]
        return {"images": self.images, "annotations": self.annotations, "categories": categories}


def _tell(on_picture: Callable[[str, Detections], None] | None, name: str, found: Detections) -> None:
    if on_picture is not None:
        on_picture(name, found)


def _video(detector: OpenedDetector, path: Path, target: Path | None, options: dict[str, Any]) -> Iterator[Detections]:
    """Detections frame by frame; the drawn video is there only when all frames are."""
    capture = cv2.VideoCapture(str(path))
    writer, part = None, None
    try:
        if not capture.isOpened():
            raise RunError(f"cannot read {path}: not a video in a known format")
        frames = 0
        while True:
            there, frame = capture.read()
            if not there:
                break
            frames += 1
            pixels = np.ascontiguousarray(frame[:, :, ::-1])
            found = detector.detect(pixels, **options)
            if target is not None:
                if writer is None:
                    # OpenCV chooses the container by the suffix.
                    part = Path(tempfile.mkdtemp(prefix=".video-", dir=target.parent)) / target.name
                    writer = _writer(part, capture, pixels.shape)
                writer.write(np.ascontiguousarray(draw(pixels, found, detector.classes)[:, :, ::-1]))
            yield found
        if not frames:
            raise RunError(f"cannot read {path}: no frame in it")
        if writer is not None and target is not None and part is not None:
            writer.release()
            os.replace(part, target)
    finally:
        capture.release()
        if writer is not None:
            writer.release()
        if part is not None:
            part.unlink(missing_ok=True)
            part.parent.rmdir()


def _writer(path: Path, capture: Any, shape: tuple[int, ...]) -> Any:
    rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
    code = cv2.VideoWriter_fourcc(*"mp4v")  # type: ignore[attr-defined]
    writer = cv2.VideoWriter(str(path), code, rate, (shape[1], shape[0]))
    if not writer.isOpened():
        raise RunError(f"{path.name}: OpenCV cannot write videos here; run with --drawings false")
    return writer


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / ".writable", "")
        (path / ".writable").unlink()
    except OSError as error:
        raise UsageError(f"--output {path}: cannot write there: {error.strerror or error}") from error
    return path


def _unique_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A file name for every input's drawing; inputs of the same name get numbers."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        suffix = ".mp4" if is_video(path) else ".png" if path.suffix.lower() == ".png" else ".jpg"
        name, number = f"{path.stem}{suffix}", 1
        while name in taken:
            number += 1
            name = f"{path.stem}_{number}{suffix}"
        taken.add(name)
        names[path] = name
    return names
