"""Name what is in pictures: the best classes of each.

A trained run knows its architecture, classes and input format:

    replknet predict holiday.jpg pictures/ 'more/*.png' --weights runs/digits/checkpoints/best.ckpt

Official weights, results to a file (.json or .csv):

    replknet predict pictures/ --model replknet_31b --weights RepLKNet-31B_ImageNet-1K_224.pth --output answers.csv

A picture that cannot be read or answered is named, the others go on, and the exit code is 1 at the end.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser, Namespace

from replknet._errors import RunError, UsageError
from replknet._files import replacing, write_text
from replknet.cli._model_options import add_model_options, model_from
from replknet.tasks.opened_model import OpenedModel
from replknet.tasks.prediction import Prediction, find_inputs, predict
from replknet.tasks.processes import process_device


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config", help="YAML file with options; those to its right win over it")
    parser.add_argument("IMAGE", nargs="+", help="pictures, folders (everything below them) or quoted patterns")
    add_model_options(parser, positional=False)
    parser.add_argument("--merged", type=bool, default=True, help="re-parameterise first: same answers, faster")
    parser.add_argument("--top", type=int, default=5, help="classes to name")
    parser.add_argument("--output", type=str | None, help="also write the answers to this .json or .csv file")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures at a time")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode pictures")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument(
        "--dtype", type=Literal["float32", "bfloat16", "float16"], default="float32", help="precision of the network"
    )


def run(args: Namespace) -> None:
    output = Path(args.output) if args.output is not None else None
    if output is not None and output.suffix not in (".json", ".csv"):
        raise UsageError(f"{output}: give a name that ends in .json or .csv")
    if args.batch_size < 1 or args.workers < 0:
        raise UsageError(f"batch_size {args.batch_size}, workers {args.workers}: give 1 or more, and 0 or more")
    paths = find_inputs(args.IMAGE)
    opened = model_from(args, args.model, merged=args.merged)
    if opened.weights == "untrained":
        print(f"replknet: {opened.name} has no weights: its answers mean nothing", file=sys.stderr)
    names = opened.names()
    found: list[Prediction] = []
    with process_device(args.device) as device:
        for prediction in predict(
            opened.model,
            paths,
            opened.image,
            top=args.top,
            batch_size=args.batch_size,
            workers=args.workers,
            device=device,
            dtype=getattr(torch, args.dtype),
        ):
            _show(prediction, names)
            found.append(prediction)
    if output is not None:
        _write(output, found, opened, names)
    if failed := sum(prediction.error is not None for prediction in found):
        raise RunError(f"{failed} of {len(found)} pictures got no answer")


def _show(prediction: Prediction, names: list[str]) -> None:
    if prediction.error is not None:
        print(f"replknet: {prediction.error}", file=sys.stderr)
        return
    print(prediction.path)
    for index, score in zip(prediction.classes, prediction.scores, strict=True):
        print(f"  {100 * score:5.1f} %  {names[index]}")


def _write(path: Path, found: list[Prediction], opened: OpenedModel, names: list[str]) -> None:
    if path.suffix == ".json":
        entries = [_entry(prediction, names) for prediction in found]
        content = {"model": opened.name, "weights": opened.weights, "predictions": entries}
        write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "rank", "class", "name", "probability", "error"])
        for prediction in found:
            if prediction.error is not None:
                writer.writerow([prediction.path, "", "", "", "", prediction.error])
            for rank, (index, score) in enumerate(zip(prediction.classes, prediction.scores, strict=True), 1):
                writer.writerow([prediction.path, rank, index, names[index], f"{score:.6f}", ""])


def _entry(prediction: Prediction, names: list[str]) -> dict[str, Any]:
    if prediction.error is not None:
        return {"image": str(prediction.path), "error": prediction.error}
    classes = [
        {"class": index, "name": names[index], "probability": round(score, 6)}
        for index, score in zip(prediction.classes, prediction.scores, strict=True)
    ]
    return {"image": str(prediction.path), "classes": classes}
