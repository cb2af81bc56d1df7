"""Figure of shape biases: one row a category, one marker a network, and humans as the line to reach."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from replknet.analysis.shape_bias import HUMAN_BIAS, ShapeBias, categories, human_category_bias
from replknet.plotting._figures import COLOURS, new_figure, save, style

__all__ = ["confusion", "save", "shape_bias"]

_HUMAN = "#B2182B"
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def shape_bias(results: Sequence[ShapeBias], *, humans: bool = True) -> Figure:
    """Per-category points and pooled lines of several networks, texture to the right as in the literature.

    Args:
        results: of networks, drawn in this order.
        humans: draw ten human subjects too.
    """
    if not results:
        raise ValueError("there is nothing to draw: give at least one result")
    human = human_category_bias()
    order = sorted(categories(), key=human.__getitem__)
    rows = {name: index for index, name in enumerate(order)}
    with style():
        figure = new_figure(4.6, 4.9)
        axes = figure.add_subplot()
        # Markers of one category stand a little above one another, so that equal values stay visible.
        step = 0.36 / max(len(results), 3)
        for index, result in enumerate(results):
            look = {
                "shift": step * ((len(results) - 1) / 2 - index),
                "color": COLOURS[index % len(COLOURS)],
                "marker": _MARKERS[index % len(_MARKERS)],
            }
            _points(axes, result.name, result.category_bias(), result.bias, rows, look)
        if humans:
            _points(axes, "humans", dict(human), HUMAN_BIAS, rows, {"shift": 0.0, "color": _HUMAN, "marker": "d"})
        _axes(axes, order)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def confusion(result: ShapeBias) -> Figure:
    """Answers by category of the shape, each row as shares of its pictures."""
    counts = result.confusion().astype(np.float64)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = list(categories())
    with style():
        figure = new_figure(4.4, 4.3)
        axes = figure.add_subplot()
        image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="answer", ylabel="shape shown", title=result.name)
        figure.colorbar(image, ax=axes, fraction=0.045, pad=0.02, label="share of the row")
    return figure


def _points(
    axes: Any,
    name: str,
    biases: dict[str, Any],
    pooled: float | None,
    rows: dict[str, int],
    look: dict[str, Any],
) -> None:
    label = name if pooled is None else f"{name} ({pooled:.1%})"
    shift = look.pop("shift")
    shown = [(1 - value, rows[category] + shift) for category, value in biases.items() if value is not None]
    x, y = zip(*shown, strict=True) if shown else ((), ())
    axes.scatter(
        x, y, s=34, alpha=0.85, linewidths=0.4, edgecolors="white", zorder=3, clip_on=False, label=label, **look
    )
    if pooled is not None:
        axes.axvline(1 - pooled, color=look["color"], linewidth=1.3, zorder=2)


def _axes(axes: Any, order: list[str]) -> None:
    axes.set(xlim=(0, 1), ylim=(-0.6, len(order) - 0.4), xlabel="share of texture decisions  →")
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_yticks(range(len(order)), order)
    axes.set_ylabel("category of the shape")
    axes.tick_params(axis="y", length=0)
    axes.hlines(np.arange(len(order) - 1) + 0.5, 0, 1, color="0.85", linewidth=0.6, linestyle=":", zorder=1)
    top = axes.secondary_xaxis("top", functions=(lambda x: 1 - x, lambda x: 1 - x))
    top.set_xlabel("←  share of shape decisions (shape bias)")
    top.set_xticks(np.linspace(0, 1, 6))
