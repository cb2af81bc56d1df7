"""Measure whether networks name pictures by shape or by texture, beside humans.

The 1280 cue-conflict pictures are fetched once, under their licence:

    replknet shape-bias --download data

One network, or several in one figure with the human line:

    replknet shape-bias replknet_31b,weights=RepLKNet-31B_ImageNet-1K_224.pth --images data/cue-conflict
    replknet shape-bias replknet_31b,weights=31b.pth torchvision:resnet50,pretrained --images data/cue-conflict

A model is written NAME[,weights=FILE][,pretrained][,merged][,label=TEXT][,KEY:=VALUE]: a timm name, torchvision:NAME,
or MODULE:FUNCTION. Files in the output folder: NAME.json (biases, interval, confusion), cue-conflict_NAME_session-1.csv
(every decision, in model-vs-human's schema), NAME_confusion.png, and shape_bias.png with all networks.
"""

import json
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser, Namespace
from tqdm import tqdm

from replknet._errors import UsageError
from replknet._files import write_text
from replknet.analysis.cue_conflict import LICENCE, N_IMAGES, download_cue_conflict
from replknet.analysis.erf_record import versions
from replknet.analysis.shape_bias import ShapeBias, Stimulus, find_stimuli, read_csv, shape_bias, summary, write_csv
from replknet.cli._model_sources import ModelSource, set_image_size
from replknet.cli._options import file_stem, parse_device, parse_size
from replknet.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from replknet.plotting import shape_bias as figures

_NORMALISATION = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "half": ((0.5,) * 3, (0.5,) * 3)}


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", action="config", help="YAML file with options")
    add("MODEL", nargs="*", help="networks with 1000 outputs; the same as --models")
    add("--models", type=list[str], default=[], help="networks, for use in a YAML file")
    add(
        "--images",
        type=str | None,
        default=None,
        help="folder with the cue-conflict pictures: SHAPE/SHAPEn-TEXTUREm.png",
    )
    add(
        "--decisions",
        type=list[str],
        default=[],
        help="decisions made elsewhere to draw beside: CSV files of model-vs-human",
    )
    add(
        "--download",
        type=str | None,
        default=None,
        help="fetch the pictures into this folder, and use them unless --images is given",
    )
    add(
        "--size",
        type=str | int | None,
        default=None,
        help="resize the pictures to these pixels; by default they stay 224 x 224, as in model-vs-human",
    )
    add(
        "--normalize",
        type=Literal["model", "imagenet", "half"],
        default="model",
        help="mean and standard deviation: each network's own, ImageNet's, or 0.5",
    )
    add("--batch_size", type=int, default=32, help="pictures a pass")
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--output", type=str, default="runs/shape_bias", help="folder for the results")
    add("--format", type=Literal["png", "svg", "pdf"], default="png", help="of the figures")
    add("--humans", type=bool, default=True, help="draw ten human subjects in the figure")


def run(args: Namespace) -> None:
    sources = [ModelSource.parse(text) for text in [*args.MODEL, *args.models]]
    folder = args.images
    if args.download is not None:
        print(LICENCE, file=sys.stderr)
        fetched = download_cue_conflict(args.download, progress=sys.stderr.isatty())
        folder = folder or str(fetched)
        print(f"{N_IMAGES} pictures: {fetched}")
        if not sources and not args.decisions:
            return
    if not sources and not args.decisions:
        raise UsageError("name at least one network, for example: replknet shape-bias replknet_31b --images DIR")
    if sources and folder is None:
        raise UsageError("give --images with the cue-conflict pictures, or --download FOLDER to fetch them")
    _refuse_same_names(sources)
    results = [read_csv(Path(path)) for path in args.decisions]
    stimuli = find_stimuli(folder) if sources else []
    output = Path(args.output).expanduser()
    for source in sources:
        result, how = _measure(source, stimuli, args)
        _write(result, {**how, "images_folder": str(folder)}, output, args.format)
        results.append(result)
    figures.save(figures.shape_bias(results, humans=args.humans), output / f"shape_bias.{args.format}")
    print(summary(results))
    if sources and len(stimuli) < N_IMAGES:
        print(f"beware: {len(stimuli)} of the {N_IMAGES} pictures: published biases are of all", file=sys.stderr)
    print(output)


def _measure(source: ModelSource, stimuli: list[Stimulus], args: Namespace) -> tuple[ShapeBias, dict[str, Any]]:
    # Random weights come from a seed, so that a result can be had again.
    model = source.build() if source.is_trained else source.build_untrained()
    size = None if args.size is None else parse_size(args.size)
    set_image_size(model, size or (224, 224), source.name)
    mean, std = _normalisation(model, args.normalize)
    with tqdm(total=len(stimuli), desc=source.label, unit="picture", disable=None, leave=False) as bar:

        def progress(done: int) -> None:
            bar.update(done - bar.n)

        result = shape_bias(
            model,
            stimuli,
            mean=mean,
            std=std,
            size=size,
            name=source.label,
            batch_size=args.batch_size,
            device=parse_device(args.device),
            progress=progress,
        )
    if not source.is_trained:
        print(f"beware ({source.label}): the weights are random", file=sys.stderr)
    how = {"model": source.describe(), "mean": mean, "std": std, "size": size, "versions": versions()}
    return result, how


def _write(result: ShapeBias, how: dict[str, Any], output: Path, figure_format: str) -> None:
    stem = file_stem(result.name)
    write_csv(result, output)
    write_text(output / f"{stem}.json", json.dumps({**result.record(), **how}, indent=1) + "\n")
    figures.save(figures.confusion(result), output / f"{stem}_confusion.{figure_format}")


def _normalisation(model: torch.nn.Module, choice: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if choice != "model":
        return _NORMALISATION[choice]
    config = getattr(model, "pretrained_cfg", None) or {}
    return tuple(config.get("mean", IMAGENET_MEAN)), tuple(config.get("std", IMAGENET_STD))


def _refuse_same_names(sources: list[ModelSource]) -> None:
    if len({source.label for source in sources}) < len(sources):
        raise UsageError("two networks have the same name; tell them apart with ,label=TEXT")
