"""Parameters, multiply-adds and FLOPs of segmentors, beside the published ones.

    replknet segment complexity
    replknet segment complexity replknet_31b.in22k_upernet_ade20k --size 512x512
    replknet segment complexity --config recipes/segmentation/replknet_31b_1k_upernet_ade20k_512.py --size 512x2048

Counted with the re-parameterised backbone and without the auxiliary head, which only training uses. FLOPs are those of
MMCV's counter, as in the published table; docs/segmentation.md compares. No weights are loaded.
"""

from typing import Any

from jsonargparse import ArgumentParser, Namespace

from replknet._errors import UsageError
from replknet.analysis.complexity import Complexity, complexity
from replknet.cli._options import parse_size
from replknet.cli._tables import table
from replknet.models.weights import WEIGHTS


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("WEIGHTS", nargs="*", type=str, help="official weights' names; all five by default", default=[])
    add("--config", type=str | None, help="a recipe or MMSegmentation config instead")
    add("--cfg_options", nargs="*", type=str, default=[], help="changes of the config")
    add("--size", type=str | None, help="height x width; by default that of the published figures")


def run(args: Namespace) -> None:
    from replknet.tasks.openmmlab import require

    require("segmentation")
    from replknet.cli.segment._options import config_from

    if (config := config_from(args)) is not None:
        rows = [_row(args.config, _count(config, parse_size(args.size or "512")), None)]
    else:
        rows = [_official_row(name, args.size) for name in args.WEIGHTS or _official_names()]
    print(table(("segmentor", "input", "params M", "multiply-adds G", "FLOPs G", "published"), rows, left=2))


def _official_names() -> list[str]:
    return [name for name, entry in WEIGHTS.items() if entry.task == "segmentation"]


def _official_row(name: str, size: str | None) -> list[str]:
    from replknet.tasks.segmentation.official import official_config, published_size

    entry = WEIGHTS.get(name)
    if entry is None or entry.task != "segmentation":
        raise UsageError(f"no segmentor is called {name!r}; known: {', '.join(_official_names())}")
    counted = _count(official_config(entry), parse_size(size) if size else published_size(entry))
    return _row(name, counted, None if size else entry.published_cost)


def _count(config: Any, size: tuple[int, int]) -> Complexity:
    from replknet.tasks.segmentation.complexity import counted_segmentor

    return complexity(counted_segmentor(config), (3, *size))


def _row(name: str, counted: Complexity, published: tuple[float, float, tuple[int, int]] | None) -> list[str]:
    _, height, width = counted.input_size
    told = "" if published is None else f"{published[0]:.0f} M, {published[1]:.0f} G"
    cells = [f"{count:.1f}" for count in (counted.params / 1e6, counted.macs / 1e9, counted.mmcv_flops / 1e9)]
    return [name, f"{height}x{width}", *cells, told]
