"""Count the parameters, multiply-adds and FLOPs of a detector, beside the published ones.

    replknet detect complexity replknet_31b.in1k_fcos_coco replknet_xl.meg73m_cascade_mask_rcnn_coco
    replknet detect complexity recipes/detection/replknet_tiny_fcos.py --size 640x640 --merged false --parts true

Names of official weights stand for their detectors; nothing is downloaded. Box heads are counted for 1000 regions and
mask heads for 100, the backbone re-parameterised. FLOPs are those of MMCV's counter, as in the published table;
docs/detection.md compares. The parts are counted in multiply-adds.
"""

import json
from dataclasses import asdict

import torch
from jsonargparse import ArgumentParser, Namespace

from replknet._errors import UsageError
from replknet.analysis.complexity import Complexity, complexity
from replknet.cli._options import parse_size
from replknet.cli._tables import table
from replknet.models.weights import WEIGHTS


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("DETECTOR", nargs="*", help="official weights' names, or configs; by default all official detectors")
    add("--size", type=str, default="800x1280", help="height x width of the input")
    add("--merged", type=bool, default=True, help="count the re-parameterised backbone, not the training form")
    add("--parts", type=bool, default=False, help="backbone, neck and heads on lines of their own")
    add("--json", type=bool, default=False, help="JSON instead of a table")


def run(args: Namespace) -> None:
    size = parse_size(args.size)
    official = [name for name, entry in WEIGHTS.items() if entry.task == "detection"]
    counted = {name: count(name, size, merged=args.merged) for name in args.DETECTOR or official}
    if args.json:
        print(json.dumps({name: asdict(cost) for name, cost in counted.items()}, indent=1))
        return
    rows = []
    for name, cost in counted.items():
        published = _published(name, size)
        rows.append([name, *_cells(cost.params / 1e6, cost.macs / 1e9, cost.mmcv_flops / 1e9), *published])
        parts = cost.parts if args.parts else ()
        rows += [[f"  {part.name}", *_cells(part.params / 1e6, part.macs / 1e9), "", "", ""] for part in parts]
    print(table(("detector", "params M", "multiply-adds G", "FLOPs G", "published M", "published G"), rows))


def count(source: str, size: tuple[int, int], *, merged: bool = True) -> Complexity:
    """Costs of a detector in one picture of `size`, height and width."""
    from replknet.tasks.detection.costs import FixedCost
    from replknet.tasks.detection.detector import build_detector, prepare_for_inference
    from replknet.tasks.detection.official import official_config, official_detector
    from replknet.tasks.openmmlab.configs import read_config

    entry = official_detector(source)
    config = official_config(entry) if entry is not None else read_config(source)
    # What is counted does not depend on values: nothing is allocated.
    with torch.device("meta"):
        detector = prepare_for_inference(build_detector(config), merged=merged)
        try:
            return complexity(FixedCost(detector), (3, *size))
        except ValueError as error:
            raise UsageError(f"{source} at {size[0]} x {size[1]}: {error}") from error


def _published(name: str, size: tuple[int, int]) -> list[str]:
    entry = WEIGHTS.get(name)
    if entry is None or entry.published_cost is None or entry.published_cost[2] != size:
        return ["", ""]
    return [f"{entry.published_cost[0]:g}", f"{entry.published_cost[1]:g}"]


def _cells(*counts: float) -> list[str]:
    return [f"{count:.1f}" for count in counts]
