"""Count parameters, multiply-adds and activations of any network at any input size.

    replknet complexity replknet_31b,merged --size 224
    replknet complexity replknet_31b,merged replknet_31l,merged torchvision:resnet50 --size 384 --parts true
    replknet complexity my_models.py:build --size 512x2048 --json true

Multiply-adds are those of convolutions and linear layers, which the published tables call FLOPs; these count the merged
form. `merged` here folds the norms too, which leaves a few parameters less and the same FLOPs. `replknet models` prints
the release's tables. No weights are loaded. A model is written
NAME[,merged][,label=TEXT][,KEY:=VALUE]: a timm name, torchvision:NAME, or MODULE:FUNCTION.
"""

import json
from dataclasses import asdict, replace

from jsonargparse import ArgumentParser, Namespace

from replknet._errors import UsageError
from replknet.analysis.complexity import Complexity, complexity
from replknet.cli._model_sources import ModelSource, set_image_size
from replknet.cli._options import parse_size
from replknet.cli._tables import table


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", action="config", help="YAML file with options")
    add("MODEL", nargs="*", help="networks; the same as --models")
    add("--models", type=list[str], default=[], help="networks, for use in a YAML file")
    add("--size", type=str | int, default="224", help="pixels, or height x width (512x2048)")
    add("--parts", type=bool, default=False, help="a row for every stage or part too")
    add("--json", type=bool, default=False, help="JSON instead of a table")


def run(args: Namespace) -> None:
    sources = [ModelSource.parse(text) for text in [*args.MODEL, *args.models]]
    if not sources:
        raise UsageError("name at least one network, for example: replknet complexity replknet_31b,merged")
    counted = {source.label: _count(source, parse_size(args.size)) for source in sources}
    if args.json:
        print(json.dumps({name: asdict(cost) for name, cost in counted.items()}, indent=1))
        return
    print(table(("network", "input", "params M", "FLOPs G", "activations M"), _rows(counted, parts=args.parts)))


def _count(source: ModelSource, size: tuple[int, int]) -> Complexity:
    # What is counted does not depend on the weights, and reading or downloading them takes long.
    model = replace(source, untrained=True).build()
    set_image_size(model, size, source.name)
    config = getattr(model, "pretrained_cfg", None) or {}
    chans = int(getattr(model, "in_chans", 0) or config.get("input_size", (3,))[0])
    try:
        return complexity(model, (chans, *size))
    except (ValueError, AssertionError) as error:
        raise UsageError(f"{source.name} at {size[0]} × {size[1]}: {error}") from error


def _rows(counted: dict[str, Complexity], *, parts: bool) -> list[list[str]]:
    rows = []
    for name, cost in counted.items():
        _, height, width = cost.input_size
        rows.append([name, f"{height}x{width}", *_cells(cost.params, cost.macs, cost.activations)])
        for part in cost.parts if parts else ():
            shape = "" if part.output_shape is None else "x".join(map(str, part.output_shape))
            rows.append([f"  {part.name}", shape, *_cells(part.params, part.macs, part.activations)])
    return rows


def _cells(params: int, macs: int, activations: int) -> list[str]:
    return [_short(params / 1e6), _short(macs / 1e9), _short(activations / 1e6)]


def _short(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"
