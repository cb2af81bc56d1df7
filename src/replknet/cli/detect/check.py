"""Check an annotation file in COCO's format and its pictures, and say what is in it.

replknet detect check train.json pictures
replknet detect check /data/coco/annotations/instances_train2017.json /data/coco/train2017 --check full --masks true
"""

from collections import Counter
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from replknet.cli._tables import table
from replknet.cli.detect._options import progress, say


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("ANNOTATIONS", type=str, help="COCO file of instances")
    add("IMAGES", type=str, help="folder of its pictures")
    add(
        "--check",
        type=Literal["files", "headers", "full"],
        default="headers",
        help="that every picture exists, has the annotated size, decodes to the end",
    )
    add("--masks", type=bool, default=False, help="every object must have an outline, as Cascade Mask R-CNN needs")


def run(args: Namespace) -> None:
    from replknet.tasks.detection.annotations import check_pictures, read_annotations, require_masks

    found = read_annotations(args.ANNOTATIONS)
    if args.masks:
        require_masks(found)
    check_pictures(found, args.IMAGES, args.check, progress)
    say(found.notes)
    counts = Counter(annotation["category_id"] for annotation in found.dataset["annotations"])
    print(table(("class", "id", "objects"), [[n, str(i), str(counts[i])] for n, i in found.category_ids.items()]))
    print(f"{len(found.dataset['images'])} pictures, {sum(counts.values())} objects, {len(found.classes)} classes")
