"""Find objects in pictures, folders and videos; writes drawings and predictions.json, a data set in COCO's format.

    replknet detect predict street.jpg holiday/ 'more/*.png' --weights runs/mine/best.pth --output found
    replknet detect predict film.mp4 --weights replknet_31b.in1k_cascade_mask_rcnn_coco --output found --device cuda

Only what is surely a person or a dog:

    replknet detect predict holiday/ --weights runs/mine/best.pth --score_threshold 0.7 --classes '[person, dog]'

An input that cannot be read is named, the others go on, and the exit code is 1 at the end.
"""

import sys
from collections.abc import Iterable
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from replknet._errors import RunError, UsageError
from replknet.cli.detect._options import add_detector_options, add_hardware_options, read_detector_config
from replknet.tasks.prediction import find_inputs
from replknet.tasks.processes import process_device


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("INPUT", nargs="+", help="pictures, videos, folders (all pictures below them) or quoted patterns")
    add_detector_options(parser)
    add("--output", type=str, default="runs/detect-predict", help="folder for drawings and predictions.json")
    add("--score_threshold", type=float, default=0.3, help="least score of an object, 0 to 1")
    add("--classes", type=list[str] | None, help="names of the classes to keep; by default all")
    add("--drawings", type=bool, default=True, help="draw what was found into copies of the pictures")
    add_hardware_options(parser, default="fp32")


def run(args: Namespace) -> None:
    from replknet.tasks.detection.detector import Detections, open_detector
    from replknet.tasks.detection.prediction import predict

    if args.weights is None:
        raise UsageError("give --weights: a checkpoint of `replknet detect train`, or official weights' name")
    if not 0 <= args.score_threshold <= 1:
        raise UsageError(f"score_threshold {args.score_threshold}: give a number from 0 to 1")
    paths = find_inputs(args.INPUT)
    with process_device(args.device) as device:
        detector = open_detector(
            args.weights,
            config=read_detector_config(args),
            merged=args.merged,
            image_size=args.image_size,
            device=device,
            precision=args.precision,
        )

        def show(name: str, found: Detections) -> None:
            if sys.stderr.isatty() and " frame " in name:
                return
            counts = {label: int((found.labels == label).sum()) for label in dict.fromkeys(found.labels.tolist())}
            parts = [f"{count} {detector.classes[label]}" for label, count in counts.items()]
            print(f"{name}: {', '.join(parts) or 'nothing'}")

        report = predict(
            detector,
            paths,
            args.output,
            threshold=args.score_threshold,
            classes=args.classes,
            drawings=args.drawings,
            on_picture=show,
            progress=_bar,
        )
    print(f"{report.objects} objects in {report.pictures} pictures; {report.written[-1]}")
    for error in report.errors:
        print(f"replknet: {error}", file=sys.stderr)
    if report.errors:
        raise RunError(f"{len(report.errors)} of {len(paths)} inputs could not be read")


def _bar(items: Iterable[Any], what: str, total: int | None) -> Iterable[Any]:
    if not sys.stderr.isatty():
        return items
    from tqdm import tqdm

    return tqdm(items, desc=what, total=total)
