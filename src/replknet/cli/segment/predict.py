"""Segment pictures: colour overlays, label maps and a JSON file.

    replknet segment predict street.jpg pictures/ --weights runs/my/iter_20000.pth --output out
    replknet segment predict 'photos/*.jpg' --weights replknet_31b.in22k_upernet_ade20k --tta --output out

For every picture: NAME.overlay.jpg to look at, NAME.labels.png with a class number a pixel (shown in the classes'
colours), and an entry in predictions.json with the classes found and their shares. A picture that cannot be read is
named, the others go on, and the exit code is 1 at the end.
"""

import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from replknet._errors import RunError
from replknet.cli.segment._options import add_segmentor_options, config_from


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("IMAGE", nargs="+", help="pictures, folders (everything below them) or quoted patterns")
    add_segmentor_options(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--opacity", type=float, default=0.5, help="of the colours over the picture, 0 to 1")


def run(args: Namespace) -> None:
    from replknet.tasks.openmmlab import require

    require("segmentation")
    from replknet.tasks.prediction import find_inputs
    from replknet.tasks.processes import process_device
    from replknet.tasks.segmentation.prediction import predict_to_folder
    from replknet.tasks.segmentation.segmentor import open_segmentor

    paths = find_inputs(args.IMAGE)
    with process_device(args.device) as device:
        opened = open_segmentor(
            args.weights,
            config=config_from(args),
            mode=args.mode,
            tta=args.tta,
            merged=args.merged,
            device=device,
            precision=args.precision,
        )
        if args.weights is None:
            print("replknet: the segmentor has no weights: its labels mean nothing", file=sys.stderr)
        failed = 0
        for number, result in enumerate(predict_to_folder(opened, paths, args.output, args.opacity), 1):
            if result.error is not None:
                failed += 1
                print(f"replknet: {result.error}", file=sys.stderr)
                continue
            shares = ", ".join(f"{found.name} {100 * found.share:.0f} %" for found in result.classes[:5])
            print(f"{number}/{len(paths)} {result.path}: {shares}", flush=True)
    if failed:
        raise RunError(f"{failed} of {len(paths)} pictures could not be read")
    print(args.output / "predictions.json")
