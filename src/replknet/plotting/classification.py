"""Figures of a trained classifier: how it learned, what it confuses, what it answers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from replknet.plotting._figures import COLOURS, new_figure, style

_RIGHT, _WRONG = COLOURS[2], COLOURS[1]
_TRAINING, _TEST, _AVERAGED = "training", "test", "test, averaged weights"
_KIND_COLOURS = {_TRAINING: COLOURS[5], _TEST: COLOURS[0], _AVERAGED: COLOURS[1]}
_LOSSES = {"train/loss": _TRAINING, "val/loss": _TEST, "val_ema/loss": _AVERAGED}
_ACCURACIES = {"val/top1": _TEST, "val_ema/top1": _AVERAGED}


def training_curve(runs: Mapping[str, Sequence[Mapping[str, Any]]], *, target: float | None = None) -> Figure:
    """Loss and accuracy over the steps of one run or several.

    Args:
        runs: name of a run → records of its `metrics.jsonl`: "step" and some of "train/loss", "val/loss", "val/top1"
            (percent), "val_ema/loss", "val_ema/top1". A colour is a kind of line in one run, a run in several.
        target: accuracy to mark with a line, percent.
    """
    with style():
        figure = new_figure(7.4, 2.7)
        left, right = figure.subplots(1, 2)
        for number, (name, records) in enumerate(runs.items()):
            colour = COLOURS[number % len(COLOURS)] if len(runs) > 1 else None
            for axes, curves in ((left, _LOSSES), (right, _ACCURACIES)):
                for key, kind in curves.items():
                    _curve(axes, records, key, kind, name, colour)
        steps = [record["step"] for records in runs.values() for record in records if "val/top1" in record]
        if target is not None:
            right.axhline(target, color="#888888", linewidth=0.9, linestyle=(0, (4, 3)))
            right.text(min(steps, default=0), target, f"{target:g} %", va="bottom", fontsize=8, color="#666666")
        left.set(xlabel="step", ylabel="loss", title="Cross-entropy")
        left.set_ylim(bottom=0)
        right.set(xlabel="step", ylabel="percent right", title="Accuracy on test pictures")
        right.set_ylim(0, 104)
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
            axes.set_axisbelow(True)
            if len(axes.get_legend_handles_labels()[0]) > 1:
                # Long names run over the frame; they do not squeeze the curves.
                axes.legend(frameon=False).set_in_layout(False)
    return figure


def _curve(
    axes: Axes, records: Sequence[Mapping[str, Any]], key: str, kind: str, run: str, run_colour: str | None
) -> None:
    steps, values = _series(records, key)
    # What was not measured has no line, and so no place in the legend.
    if not values:
        return
    colour = run_colour or _KIND_COLOURS[kind]
    last = f"{values[-1]:.1f} %"
    label = f"{run}, {kind}" if run_colour else kind
    axes.plot(
        steps,
        values,
        color=colour,
        label=f"{label}: {last}" if run_colour and key in _ACCURACIES else label,
        linewidth=1.0 if kind == _TRAINING else 1.6,
        alpha=0.5 if run_colour and kind == _TRAINING else 1.0,
        linestyle="--" if run_colour and kind == _AVERAGED else "-",
        marker="o" if kind != _TRAINING and len(values) <= 40 else "",
        markersize=3,
    )
    alone = not any("val_ema/top1" in record for record in records)
    if run_colour is None and key in ("val_ema/top1", "val/top1" if alone else None):
        place: dict[str, Any] = {"textcoords": "offset points", "xytext": (0, -14), "ha": "right"}
        axes.annotate(last, (steps[-1], values[-1]), fontweight="bold", color=colour, **place)


def confusion_matrix(counts: Any, names: Sequence[str]) -> Figure:
    """Counts of labels (rows) against answers (columns); numbers are written where there are at most 20 classes.

    Args:
        counts: `[classes, classes]` integers.
        names: of the classes.
    """
    table = np.asarray(counts)
    if table.shape != (len(names), len(names)):
        raise ValueError(f"a table of {table.shape} does not fit {len(names)} class names")
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    side = min(9.0, 1.4 + 0.27 * len(names))
    with style():
        figure = new_figure(side, side)
        axes = figure.add_subplot()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if len(names) <= 20:
            for (row, column), count in np.ndenumerate(table):
                if count:
                    colour = "white" if shares[row, column] > 0.6 else "#333333"
                    if row != column:
                        colour = _WRONG
                    weight = "normal" if row == column else "bold"
                    axes.text(
                        column, row, str(count), ha="center", va="center", color=colour, fontsize=8, fontweight=weight
                    )
            axes.set_xticks(range(len(names)), names)
            axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="answer", ylabel="label")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure


def prediction_grid(
    pictures: Sequence[Image.Image],
    labels: Sequence[str],
    answers: Sequence[str],
    scores: Sequence[float],
    *,
    columns: int = 8,
) -> Figure:
    """Pictures with what the network says about them; wrong answers are framed, marked and told with the label.

    Args:
        pictures: what is shown.
        labels, answers: class names.
        scores: probability of each answer, 0 to 1.
        columns: pictures in a row.
    """
    rows = -(-len(pictures) // columns)
    with style():
        figure = new_figure(0.92 * columns, 1.2 * rows)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in panels:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for axes, picture, label, answer, score in zip(panels, pictures, labels, answers, scores, strict=False):
            right = label == answer
            colour = _RIGHT if right else _WRONG
            axes.imshow(np.asarray(picture), cmap="gray")
            axes.spines[:].set(visible=True, color=colour, linewidth=1.0 if right else 2.2)
            text = f"✓ {answer}" if right else f"✗ {answer}, is {label}"
            axes.set_title(text, color=colour, fontsize=8, pad=3)
            axes.set_xlabel(f"{100 * score:.0f} %", fontsize=7, color="#666666", labelpad=2)
    return figure


def _series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    pairs = [(record["step"], record[name]) for record in records if name in record]
    return [step for step, _ in pairs], [value for _, value in pairs]
