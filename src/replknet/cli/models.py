"""List the RepLKNets and all official weights: parameters, FLOPs, input size, published score.

    replknet models
    replknet models 31b in22k
    replknet models 'replknet_xl*' --json
    replknet models --task segmentation

FLOPs are multiply-adds of convolutions and linear layers in the merged form, as in the published tables; segmentation
and detection rows quote the release, head included. `replknet info MODEL` shows one model stage by stage.
"""

import json
from dataclasses import asdict
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from replknet.analysis.model_table import Row, model_table
from replknet.cli._tables import number, table
from replknet.models.weights import Score


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config", help="YAML file with options; those to its right win over it")
    parser.add_argument(
        "FILTER", nargs="*", type=str, help="words that a row must contain, or a pattern such as '*_384'", default=[]
    )
    tasks = Literal["classification", "segmentation", "detection"]
    parser.add_argument("--task", type=tasks | None, help="rows of one task only", default=None)
    parser.add_argument("--json", type=bool, nargs="?", const=True, help="JSON with files and URLs", default=False)


def run(args: Namespace) -> None:
    rows = model_table(args.FILTER, task=args.task)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    header = ("name", "trained on", "task", "score", "input", "params M", "FLOPs G")
    print(table(header, [_cells(row) for row in rows], left=4))


def _cells(row: Row) -> tuple[str, ...]:
    height, width = row.input_size[1:]
    flops = f"{row.gmacs:.2f}" if row.gmacs >= 1 else f"{row.gmacs:.3f}"
    if row.cost_size != row.input_size[1:]:
        flops = f"{row.gmacs:.0f} at {row.cost_size[0]}x{row.cost_size[1]}"
    return (
        row.name,
        " > ".join(row.trained_on) or "untrained",
        row.method or row.task,
        ", ".join(f"{score.metric} {number(score.value)}" for score in _published(row)),
        str(height) if height == width else f"{height}x{width}",
        f"{row.params:.1f}",
        flops,
    )


def _published(row: Row) -> list[Score]:
    """Scores without those that others measured again."""
    return [score for score in row.scores if score.source != "mmpretrain"]
