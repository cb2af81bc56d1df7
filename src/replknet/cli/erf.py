"""Measure and draw effective receptive fields of any network.

The release's protocol: 50 images at 1024 x 1024, gradient of the last feature map's centre, area ratios.

    replknet erf replknet_31b,weights=RepLKNet-31B_ImageNet-1K_224.pth --images imagenet/val

Several networks side by side on one scale, each beside its untrained self:

    replknet erf replknet_31b,weights=31b.pth torchvision:resnet50,pretrained --untrained true --images imagenet/val

Every stage of one network, small and quick, on noise; then a network of your own, a function that returns a module:

    replknet erf convnext_atto --images noise --size 256 --n 4 --layer stages
    replknet erf my_models.py:build,label=mine --images photos

A model is written NAME[,weights=FILE][,pretrained][,merged][,label=TEXT][,layer=NAME][,KEY:=VALUE]: a timm name,
torchvision:NAME, or MODULE:FUNCTION. In the output folder: NAME.npy (the matrix), NAME.json (ratios, how to redo it,
what to beware of), NAME.png, NAME_overlay.png, profiles.png, grid.png for several, and config.yaml, which repeats the
run with --config. A stopped run goes on where it was when the same command is given again.
"""

import sys
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from tqdm import tqdm

from replknet._errors import RunError, UsageError
from replknet._files import write_text
from replknet.analysis.erf import ErfResult, Score, Variant, effective_receptive_fields
from replknet.analysis.erf_record import LOG_WARNING
from replknet.analysis.features import Layout
from replknet.analysis.images import NOISE, Broken, NoiseImages, PreparedImages, open_pictures
from replknet.cli._erf_files import Entry, OutputFolder, table
from replknet.cli._model_sources import ModelSource, set_image_size, silent_scales
from replknet.cli._options import DTYPES, file_stem, parse_device, parse_size
from replknet.data.transforms import IMAGENET_MEAN, IMAGENET_STD

Normalize = Literal["imagenet", "model", "half"]


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", action="config", help="YAML file with options, config.yaml of an earlier run for example")
    add("MODEL", nargs="*", help="networks to look into; the same as --models")
    add("--models", type=list[str], default=[], help="networks to look into, for use in a YAML file")
    add(
        "--images",
        type=str | None,
        default=None,
        help="folder of pictures in any arrangement, a data set as in `replknet train --data`, or noise",
    )
    add("--split", type=str, default="validation", help="split of a data set")
    add("--size", type=str | int, default="1024", help="pixels, or height x width (768x1024)")
    add("--n", type=int, default=50, help="images to average")
    add(
        "--layer",
        type=str | list[str] | None,
        default=None,
        help="module to look at, several as [a,b], or stages for every resolution; by default the last feature map",
    )
    add(
        "--variant",
        type=Variant,
        default="release",
        help="what becomes of the gradient: release sums its positive part over colours, abs, squared, or signed",
    )
    add(
        "--score",
        type=Score,
        default="relu",
        help="what is differentiated at the centre: sum of relu, as the release, or sum",
    )
    add("--layout", type=Layout, default="auto", help="layout of the layer's output, if it is recognised wrongly")
    add("--untrained", type=bool, default=False, help="measure every network with random weights too")
    add(
        "--normalize",
        type=Normalize,
        default="imagenet",
        help="mean and std of the images: imagenet as the release, model for each network's own, half for 0.5",
    )
    add(
        "--seed",
        type=int | None,
        default=0,
        help="of picture order, noise and untrained weights; null keeps the folder's order, as the release does",
    )
    add(
        "--broken",
        type=Broken,
        default="skip",
        help="pictures that cannot be read: skip names and leaves them out, fatal stops",
    )
    add("--batch_size", type=int, default=1, help="images a pass; changes memory and speed only")
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add(
        "--dtype",
        type=Literal["float32", "float64", "bfloat16", "float16"],
        default="float32",
        help="precision; the 16-bit ones run under autocast",
    )
    add(
        "--checkpointing",
        type=bool | None,
        default=None,
        help="less memory for a second forward pass; by default for large images on the CPU, if the network offers it",
    )
    add("--output", type=str, default="runs/erf", help="folder for the results")
    add("--format", type=Literal["png", "svg", "pdf"], default="png", help="of the figures")
    add("--scale", type=Literal["log", "linear", "release"], default="log", help="colour scale of heatmaps")
    add("--overlay", type=bool, default=True, help="draw the field over the first picture used")


def run(args: Namespace) -> None:
    sources = [ModelSource.parse(text) for text in [*args.MODEL, *args.models]]
    if not sources:
        raise UsageError("name at least one network, for example: replknet erf replknet_31b --images DIR")
    if args.images is None:
        raise UsageError("give --images: a folder of pictures, a data set, or noise")
    if len({source.label for source in sources}) < len(sources):
        raise UsageError("two networks have the same name; tell them apart with ,label=TEXT")
    settings = _Settings(args)
    folder = OutputFolder(args.output, args.format, args.scale)
    options = {key: value for key, value in vars(args).items() if key not in ("config", "MODEL", "models")}
    config = {"models": [*args.MODEL, *args.models], **options}
    write_text(folder.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    entries = []
    for source in sources:
        for untrained in (False, True) if args.untrained and source.is_trained else (False,):
            entries += _measure(source, untrained, settings, folder)
    folder.compare(entries)
    print(table(entries))
    for line in dict.fromkeys(line for entry in entries for line in entry.warnings):
        names = [entry.label for entry in entries if line in entry.warnings]
        print(f"beware ({'all' if len(names) == len(entries) else ', '.join(names)}): {line}", file=sys.stderr)
    print(f"beware: {LOG_WARNING}", file=sys.stderr)
    print(folder.path)


class _Settings:
    """Checked options, before any model is built."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.size = parse_size(args.size)
        self.device = parse_device(args.device)
        self.pictures = None if args.images == NOISE else open_pictures(args.images, split=args.split)

    def images(self, model: torch.nn.Module) -> PreparedImages | NoiseImages:
        args = self.args
        chans = int(getattr(model, "in_chans", 0) or _config(model).get("input_size", (3,))[0])
        if self.pictures is None:
            return NoiseImages(self.size, n=args.n, seed=args.seed or 0, in_chans=chans)
        mean, std = self.normalisation(model)
        return PreparedImages(
            self.pictures, self.size, seed=args.seed, mean=mean, std=std, in_chans=chans, broken=args.broken
        )

    def normalisation(self, model: torch.nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if self.args.normalize == "half":
            return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
        if self.args.normalize == "model":
            config = _config(model)
            return tuple(config.get("mean", IMAGENET_MEAN)), tuple(config.get("std", IMAGENET_STD))
        return IMAGENET_MEAN, IMAGENET_STD


def _measure(source: ModelSource, untrained: bool, settings: _Settings, folder: OutputFolder) -> list[Entry]:
    args = settings.args
    trained = not untrained and source.is_trained
    # Random weights come from the seed, so that a result can be had again.
    model = source.build() if trained else source.build_untrained(args.seed or 0)
    set_image_size(model, settings.size, source.name)
    label = source.label + (" untrained" if untrained else "")
    images = settings.images(model)
    results = _results(source, model, images, settings, label, folder)
    mean, std = settings.normalisation(model)
    config = _config(model)
    same = (tuple(config.get("mean", mean)), tuple(config.get("std", std))) == (mean, std)
    entries = []
    for layer, result in results.items():
        name = label if len(results) == 1 else f"{label} {layer}"
        entry = Entry(name, result, model, _how(source, untrained, images, settings))
        entry.warn(
            silent=silent_scales(model),
            trained=trained,
            shuffled=args.seed is not None or args.images == NOISE,
            same=same,
        )
        folder.write(entry)
        entries.append(entry)
    if args.overlay and isinstance(images, PreparedImages):
        folder.overlay(entries[-1], images)
    return entries


def _results(
    source: ModelSource,
    model: torch.nn.Module,
    images: PreparedImages | NoiseImages,
    settings: _Settings,
    label: str,
    folder: OutputFolder,
) -> dict[str, ErfResult]:
    args = settings.args
    with tqdm(total=args.n, desc=label, unit="image", disable=None, leave=False) as bar:

        def progress(done: int, _n: int | None) -> None:
            bar.update(done - bar.n)

        try:
            return effective_receptive_fields(
                model,
                images,
                layers=source.layer or args.layer,
                variant=args.variant,
                score=args.score,
                n=args.n,
                batch_size=args.batch_size,
                device=settings.device,
                dtype=DTYPES[args.dtype],
                layout=args.layout,
                checkpointing=args.checkpointing,
                state_file=folder.path / f".{file_stem(label)}.state.npz",
                progress=progress,
            )
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"{label} at {settings.size[0]} × {settings.size[1]} does not fit the device's memory: try "
                "--batch_size 1, --checkpointing true, --dtype bfloat16, a smaller --size, or --device cpu"
            ) from error


def _how(
    source: ModelSource, untrained: bool, images: PreparedImages | NoiseImages, settings: _Settings
) -> dict[str, Any]:
    args = settings.args
    device = settings.device
    return {
        "model": {**source.describe(), "untrained": untrained},
        "images": {
            "source": args.images,
            "split": args.split,
            "seed": args.seed,
            "normalize": args.normalize,
            "interpolation": "bicubic",
            "used": images.used,
            "unreadable": images.unreadable,
            "fingerprint": images.fingerprint,
        },
        "n_asked": args.n,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "checkpointing": args.checkpointing,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }


def _config(model: torch.nn.Module) -> dict[str, Any]:
    return getattr(model, "pretrained_cfg", None) or {}
