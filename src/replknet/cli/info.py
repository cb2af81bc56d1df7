"""Show one model part by part: parameters, FLOPs, activations, output shape; and its official weights.

    replknet info replknet_31b
    replknet info replknet_31b --form train --size 384
    replknet info resnet50 --json

Any timm model; FLOPs are multiply-adds of convolutions and linear layers. A RepLKNet is counted in the merged form,
which is what runs after training, unless `--form` says otherwise.
"""

import json
from dataclasses import asdict
from typing import Any, Literal

import timm
import torch
from jsonargparse import ArgumentParser, Namespace
from torch import nn

from replknet._errors import UsageError
from replknet.analysis.complexity import Complexity, complexity
from replknet.cli._tables import number, table
from replknet.models.factory import create_model
from replknet.models.family import ARCHITECTURES
from replknet.models.weights import Weights, weights_of


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config", help="YAML file with options; those to its right win over it")
    parser.add_argument("MODEL", type=str, help="any timm model, with or without a tag")
    parser.add_argument("--size", type=list[int] | int | None, help="image side, or [height, width]", default=None)
    parser.add_argument("--num_classes", type=int | None, help="outputs of the head", default=None)
    forms = Literal["train", "merged", "fused"]
    parser.add_argument("--form", type=forms, help="form of a RepLKNet that is counted", default="merged")
    parser.add_argument("--json", type=bool, nargs="?", const=True, help="JSON instead of a table", default=False)


def run(args: Namespace) -> None:
    model = _build(args.MODEL, args.num_classes, args.form)
    cost = complexity(model, _input_size(args.MODEL, args.size))
    weights = list(weights_of(args.MODEL.partition(".")[0]))
    if args.json:
        print(json.dumps({"model": args.MODEL, **asdict(cost), "weights": [asdict(w) for w in weights]}, indent=2))
        return
    print(_text(args.MODEL, cost))
    if weights:
        print("\n" + _weights_text(weights))


def _build(name: str, num_classes: int | None, form: str) -> nn.Module:
    own: dict[str, Any] = {"form": form} if name.partition(".")[0] in ARCHITECTURES else {}
    try:
        with torch.device("meta"):
            return create_model(name, num_classes=num_classes, **own).eval()
    except (NotImplementedError, RuntimeError):  # some networks compute with their weights while they are built
        return create_model(name, num_classes=num_classes, **own).eval()


def _input_size(name: str, size: list[int] | int | None) -> tuple[int, int, int]:
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    default = cfg.input_size if cfg else (3, 224, 224)
    if size is None:
        return default
    sides = [size, size] if isinstance(size, int) else size
    if len(sides) != 2 or min(sides) < 1:
        raise UsageError(f"--size takes one positive number or [height, width]; got {size}")
    return (default[0], sides[0], sides[1])


def _text(name: str, cost: Complexity) -> str:
    rows = [
        (
            part.name,
            "x".join(map(str, part.output_shape)) if part.output_shape else "",
            f"{part.params / 1e6:.3f}",
            f"{part.macs / 1e9:.3f}",
            f"{part.activations / 1e6:.3f}",
        )
        for part in cost.parts
    ]
    total = ("total", "", f"{cost.params / 1e6:.3f}", f"{cost.macs / 1e9:.3f}", f"{cost.activations / 1e6:.3f}")
    header = ("part", "output", "params M", "FLOPs G", "activations M")
    title = f"{name}, input {'x'.join(map(str, cost.input_size))}"
    return f"{title}\n\n{table(header, [*rows, total], left=2)}"


def _weights_text(weights: list[Weights]) -> str:
    rows = [
        (
            entry.name,
            " > ".join(entry.trained_on),
            f"{entry.input_size[1]}",
            f"{entry.crop_mode} {entry.crop_pct:g}",
            f"{list(entry.mean)} {list(entry.std)}",
            ", ".join(f"{number(score.value)} ({score.source})" for score in entry.scores),
        )
        for entry in weights
    ]
    header = ("official weights", "trained on", "input", "crop", "mean, std", "top-1")
    return table(header, rows, left=6)
