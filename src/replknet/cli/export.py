"""Export a model to a file that runs without this package, and hold the written file against the model.

    replknet export replknet_31b --weights RepLKNet-31B_ImageNet-1K_224.pth --output replknet_31b.onnx
    replknet export --weights runs/digits/checkpoints/best.ckpt --format torch-export --dynamic_size true
    replknet export resnet50 --pretrained true --precision '[fp32,fp16,int8-static]' --data /data/imagenet

Small kernels are merged and batch norms folded first. The file is loaded afresh and compared with the unmerged model on
real pictures; the largest difference is printed, and a file beyond the tolerance is not kept. With --data, a labelled
set, the accuracy of both is measured too; with --images, any pictures; without either, on pictures that come with
matplotlib. `pip install 'replknet[export]'` brings what ONNX needs.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor, nn

from replknet._errors import UsageError
from replknet.cli._model_options import add_model_options, model_from
from replknet.cli._tables import table
from replknet.data import open_dataset
from replknet.data.class_matching import match_classes
from replknet.data.images import load_image
from replknet.data.sample_pictures import sample_pictures
from replknet.data.transforms import ImageFormat, evaluation_transform
from replknet.export import FORMATS, ExportReport, Format, Precision, check_precision, export_model
from replknet.export.formats import SUFFIXES, require_packages
from replknet.models.factory import create_model
from replknet.tasks.opened_model import OpenedModel, stands_for_weights
from replknet.tasks.prediction import find_inputs


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config", help="YAML file with options; those to its right win over it")
    add_model_options(parser, positional=True)
    parser.add_argument("--format", type=Format, default="onnx", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument(
        "--precision",
        type=Precision | list[Precision],
        default="fp32",
        help="arithmetic inside, one or several in brackets: fp32, fp16, bf16; int8-dynamic and int8-static for onnx",
    )
    parser.add_argument("--output", type=Path | None, help="file to write; several precisions add their names to it")
    parser.add_argument("--dynamic_batch", type=bool, default=True, help="leave the batch size open")
    parser.add_argument("--dynamic_size", type=bool, default=False, help="leave height and width open")
    parser.add_argument("--merge", type=bool, default=True, help="merge small kernels and fold batch norms first")
    parser.add_argument("--features", type=bool, default=False, help="export the feature maps of all stages instead")
    parser.add_argument("--images", type=list[str] | str, default=[], help="pictures, folders, patterns to check on")
    parser.add_argument("--data", type=str | None, help="labelled data set to check on; docs/data.md")
    parser.add_argument("--split", type=str, default="validation", help="split of that data set")
    parser.add_argument("--num_images", type=int, default=32, help="pictures to check on, spread over the whole set")
    parser.add_argument(
        "--tolerance",
        type=float | None,
        help="allowed difference, relative to the largest output; by default 1e-4 for fp32, 2e-2 for fp16, 1e-1 for "
        "bf16; int8 is judged only by a tolerance given here",
    )
    parser.add_argument("--json", type=bool, nargs="?", const=True, default=False, help="print JSON")


def run(args: Namespace) -> None:
    require_packages(args.format)
    precisions = args.precision if isinstance(args.precision, list) else [args.precision]
    if not precisions or args.num_images < 2:
        raise UsageError(f"precision {precisions}, num_images {args.num_images}: give at least one, and two or more")
    for precision in precisions:
        check_precision(args.format, precision)
    model, opened, image = _open(args)
    images, labels = _pictures(args, opened, image)
    reports = [
        export_model(
            model,
            _output(args, precision, len(precisions) > 1),
            images,
            format=args.format,
            precision=precision,
            labels=labels,
            dynamic_batch=args.dynamic_batch,
            dynamic_size=args.dynamic_size,
            merge=args.merge,
            tolerance=args.tolerance,
            metadata=_metadata(args, opened, image),
        )
        for precision in precisions
    ]
    print(json.dumps([asdict(report) for report in reports], indent=2, default=str) if args.json else _text(reports))


def _open(args: Namespace) -> tuple[nn.Module, OpenedModel | None, ImageFormat]:
    if not args.features:
        opened = model_from(args, args.MODEL)
        if opened.weights == "untrained":
            print(f"replknet: {opened.name} has no weights: the file will hold random ones", file=sys.stderr)
        return opened.model, opened, opened.image
    if args.MODEL is None:
        raise UsageError("--features needs the name of the model")
    pretrained = args.pretrained
    if pretrained is None:
        pretrained = args.weights is None and stands_for_weights(args.MODEL)
    model = create_model(
        args.MODEL,
        weights=args.weights,
        pretrained=pretrained,
        checkpoint_may_differ=("head", "norm"),
        features_only=True,
        **args.model_kwargs,
    )
    given = {"size": args.image_size, "mean": args.mean, "std": args.std, "in_chans": args.in_chans}
    return model.eval(), None, ImageFormat(**{key: value for key, value in given.items() if value is not None})


def _pictures(args: Namespace, opened: OpenedModel | None, image: ImageFormat) -> tuple[Tensor, Tensor | None]:
    """`[N, C, H, W]` prepared pictures, and their labels as outputs of the network where the data have labels."""
    transform = evaluation_transform(image)
    if args.data is not None:
        dataset: Any = open_dataset(args.data, split=args.split)
        if not hasattr(dataset, "class_names"):
            raise UsageError(f"{args.data} is a stream; checking needs a set with random access, such as a folder")
        found = [dataset.read(index, image.in_chans) for index in _spread(len(dataset), args.num_images)]
        labels = None
        if opened is not None:
            match = match_classes(dataset.class_names, opened.outputs, own_names=opened.own_names)
            labels = torch.tensor([match.targets[label] for _, label in found])
        return torch.stack([transform(picture) for picture, _ in found]), labels
    if args.images:
        paths = find_inputs([args.images] if isinstance(args.images, str) else args.images)
        pictures = [load_image(paths[i], in_chans=image.in_chans) for i in _spread(len(paths), args.num_images)]
    else:
        pictures = [load_image(picture, in_chans=image.in_chans) for picture in sample_pictures()][: args.num_images]
    tensors = [transform(picture) for picture in pictures]
    return torch.stack(tensors * 2 if len(tensors) == 1 else tensors), None


def _spread(length: int, count: int) -> list[int]:
    """`count` indices over all of a set that may be sorted by class."""
    return sorted({index * length // min(count, length) for index in range(min(count, length))})


def _output(args: Namespace, precision: str, several: bool) -> Path:
    suffix = SUFFIXES[args.format]
    name = args.MODEL or (Path(args.weights).stem if args.weights else "model")
    path = args.output or Path(name.rpartition("/")[2].rpartition(":")[2] + suffix)
    if path.is_dir():
        raise UsageError(f"--output {path} is a folder; give the name of a file")
    stem = path.name.removesuffix(suffix)
    return path.with_name(f"{stem}.{precision}{suffix}") if several else path.with_name(stem + suffix)


def _metadata(args: Namespace, opened: OpenedModel | None, image: ImageFormat) -> dict[str, Any]:
    mode, percent = image.resolved_crop()
    return {
        "model": opened.name if opened else args.MODEL,
        "weights": opened.weights if opened else str(args.weights or "untrained"),
        "input_size": [image.in_chans, image.size, image.size],
        "mean": list(image.mean),
        "std": list(image.std),
        "crop_mode": mode,
        "crop_pct": percent,
        "interpolation": image.interpolation,
        **({"class_names": opened.names()} if opened else {}),
    }


def _text(reports: list[ExportReport]) -> str:
    rows = [
        (
            str(report.path),
            report.precision,
            f"{report.bytes / 1e6:.1f}",
            f"{report.max_difference:.2e} of {report.scale:.3g}",
            f"{100 * report.agreement:.1f} %",
            _accuracy(report),
            f"{report.milliseconds:.1f} / {report.model_milliseconds:.1f}",
        )
        for report in reports
    ]
    header = ("file", "precision", "MB", "max difference", "same answer", "top-1 (model)", "ms (model)")
    return f"checked on {reports[0].images} pictures\n\n{table(header, rows, left=2)}"


def _accuracy(report: ExportReport) -> str:
    if report.accuracy is None or report.model_accuracy is None:
        return "no labels"
    return f"{100 * report.accuracy:.1f} ({100 * report.model_accuracy:.1f})"
