"""Hold a data set's folders, pictures and label maps against each other before a training does.

    replknet segment check folder photos
    replknet segment check ade20k /data/ADEChallengeData2016
    replknet segment check cityscapes /data/cityscapes --split val --every 10

Every picture must have a label map of its size whose values are in the class list. ADE20K: images/{training,validation}
and annotations/{training,validation}. Cityscapes: leftImg8bit/{train,val} and gtFine/{train,val} with
*_gtFine_labelTrainIds.png. One's own: images/{train,val}, labels/{train,val}, classes.txt.
"""

import sys
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from replknet._errors import RunError, UsageError


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("KIND", type=Literal["folder", "ade20k", "cityscapes"], help="folder (one's own), ade20k, cityscapes")
    add("ROOT", type=Path, help="folder of the data set")
    add("--split", type=Literal["train", "val"] | None, help="one of both")
    add("--every", type=int, default=1, help="read each so manieth pair only")
    add("--workers", type=int, default=4, help="threads that read")


def run(args: Namespace) -> None:
    if args.every < 1 or args.workers < 1:
        raise UsageError("--every and --workers take numbers from 1")
    from replknet.tasks.openmmlab import require

    require("segmentation")
    from replknet.tasks.segmentation.labels import IGNORED
    from replknet.tasks.segmentation.layouts import check_layout, find_layout

    problems = 0
    for split in (args.split,) if args.split else ("train", "val"):
        classes = find_layout(args.KIND, args.ROOT, split)[1]
        report = check_layout(args.KIND, args.ROOT, split, every=args.every, workers=args.workers)
        for problem in report.problems:
            print(f"replknet: {problem}", file=sys.stderr)
        problems += len(report.problems)
        total = sum(report.pixels.values()) or 1
        unused = report.unused(classes)
        ignored = 100 * report.pixels[IGNORED] / total
        text = f"{split}: {report.pictures} pictures, {classes} classes, {ignored:.1f} % ignored"
        print(text + (f"; no pixel of classes {', '.join(map(str, unused))}" if unused else ""))
    if problems:
        raise RunError(f"{problems} label maps or pictures do not fit")
