"""Write Cityscapes' training labels: *_gtFine_labelTrainIds.png from *_gtFine_labelIds.png.

    replknet segment prepare /data/cityscapes

Needs no other package. ADE20K's files are used as they are; `replknet segment check` tests both.
"""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("ROOT", type=Path, help="folder that holds gtFine")
    parser.add_argument("--overwrite", type=bool, default=False, help="write again what is there")


def run(args: Namespace) -> None:
    from replknet.tasks.openmmlab import require

    require("segmentation")
    from replknet.tasks.segmentation.layouts import write_train_ids

    print(f"{sum(1 for _ in write_train_ids(args.ROOT, overwrite=args.overwrite))} label maps written")
