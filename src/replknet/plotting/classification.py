"""Figures of a trained classifier: how it learned, what it confuses, what it answers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from replknet.plotting._figures import COLOURS, new_figure, style

_RIGHT, _WRONG = COLOURS[2], COLOURS[1]


def training_curve(records: Sequence[Mapping[str, Any]], *, target: float | None = None) -> Figure:
    """Loss and accuracy over the steps of a run.

    Args:
        records: of `metrics.jsonl`: "step" and some of "train/loss", "val/loss", "val/top1" (percent).
        target: accuracy to mark with a line, percent.
    """
    with style():
        figure = new_figure(7.4, 2.7)
        left, right = figure.subplots(1, 2)
        for name, label, colour in (("train/loss", "training", COLOURS[5]), ("val/loss", "test", COLOURS[0])):
            steps, values = _series(records, name)
            left.plot(steps, values, color=colour, label=label, linewidth=1.6)
        left.set(xlabel="step", ylabel="loss", title="Cross-entropy")
        left.set_ylim(bottom=0)
        left.legend(frameon=False)
        steps, values = _series(records, "val/top1")
        right.plot(steps, values, color=COLOURS[0], marker="o", markersize=3.5, linewidth=1.6)
        if target is not None:
            right.axhline(target, color="#888888", linewidth=0.9, linestyle=(0, (4, 3)))
            right.text(steps[0] if steps else 0, target, f"{target:g} %", va="bottom", fontsize=8, color="#666666")
        if values:
            right.annotate(
                f"{values[-1]:.1f} %",
                (steps[-1], values[-1]),
                textcoords="offset points",
                xytext=(0, -14),
                ha="right",
                fontweight="bold",
                color=COLOURS[0],
            )
        right.set(xlabel="step", ylabel="percent right", title="Accuracy on test pictures")
        right.set_ylim(min([0.0, *values]), 104)
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
            axes.set_axisbelow(True)
    return figure


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
