"""Score a detector by COCO's average precision, of boxes and, where it has them, of masks.

A trained run on its own validation data:

    replknet detect eval --weights runs/mine/best.pth --val_annotations val.json --val_images pictures

Official weights on COCO 2017, every picture once on 8 GPUs:

    torchrun --nproc_per_node 8 -m replknet detect eval --weights replknet_31b.in1k_fcos_coco --data /data/coco

Predictions that are in a file already, by the other library:

    replknet detect eval --predictions found.json --val_annotations val.json --evaluator faster-coco-eval
"""

import json
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.utilities import rank_zero_only

from replknet._errors import UsageError
from replknet._files import write_text
from replknet.cli._tables import table
from replknet.cli.detect._options import (
    add_data_options,
    add_detector_options,
    add_hardware_options,
    progress,
    read_detector_config,
    say,
)


def add_arguments(parser: ArgumentParser) -> None:
    add_detector_options(parser)
    add_data_options(parser, "val")
    add = parser.add_argument
    add("--predictions", type=str | None, help="score this JSON file of COCO results instead of running a detector")
    add(
        "--evaluator",
        type=Literal["pycocotools", "faster-coco-eval"],
        default="pycocotools",
        help="library that counts; both give the same",
    )
    add("--classwise", type=bool, default=False, help="AP of every class too")
    add("--batch_size", type=int, default=1, help="pictures at a time and process, padded to a common size")
    add("--workers", type=int, default=2, help="processes that load pictures")
    add("--save_predictions", type=str | None, help="JSON file for the predictions, in COCO's result format")
    add("--output", type=str | None, help="JSON file for the scores")
    add("--log_folder", type=str, default="runs/detect-eval", help="folder for the log")
    add_hardware_options(parser, default="fp32")


def run(args: Namespace) -> None:

    if (args.weights is None) == (args.predictions is None):
        raise UsageError("give either --weights, to run a detector, or --predictions, to score a file of results")
    scores = _score_file(args) if args.predictions is not None else _score_detector(args)
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return
    kinds = [kind for kind in ("bbox", "segm") if f"{kind}_AP" in scores]
    names = [name.removeprefix(f"{kinds[0]}_") for name in scores if name.startswith(f"{kinds[0]}_")]
    # A line a measure: with --classwise there are many.
    rows = [[name, *(f"{100 * scores[f'{kind}_{name}']:.1f}" for kind in kinds)] for name in names]
    print(table(("", *kinds), rows))
    if args.output is not None:
        write_text(Path(args.output), json.dumps(scores, indent=1) + "\n")


def _score_file(args: Namespace) -> dict[str, float]:
    from replknet.tasks.detection.evaluation import score_file

    if args.val_annotations is None:
        raise UsageError("--predictions needs --val_annotations, the COCO file to compare with")
    return score_file(args.predictions, args.val_annotations, None, args.evaluator)


def _score_detector(args: Namespace) -> dict[str, float]:
    from replknet.tasks.detection.evaluation import evaluate
    from replknet.tasks.detection.training import DataPaths

    if args.batch_size < 1 or args.workers < 0:
        raise UsageError(f"batch_size {args.batch_size}, workers {args.workers}: give 1 or more, and 0 or more")
    scores, notes = evaluate(
        args.weights,
        DataPaths(root=args.data, val_annotations=args.val_annotations, val_images=args.val_images, check=args.check),
        config=read_detector_config(args),
        merged=args.merged,
        image_size=args.image_size,
        batch_size=args.batch_size,
        workers=args.workers,
        evaluator=args.evaluator,
        classwise=args.classwise,
        save_to=args.save_predictions,
        output=args.log_folder,
        device=args.device,
        precision=args.precision,
        progress=progress,
    )
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        say(notes)
    return scores
