"""Figure of whole-network measurements: images a second and peak memory over the batch size."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from replknet.benchmark.model import ModelRow
from replknet.plotting._figures import COLOURS, new_figure, style


def model_speed_figure(rows: Sequence[ModelRow], head: str) -> Figure:
    """A row of panels a mode: throughput, and memory where it was measured; a line a configuration."""
    done = [row for row in rows if row.status == "ok"]
    modes = list(dict.fromkeys(row.mode for row in done)) or ["inference"]
    with_memory = any(row.peak_mib is not None for row in done)
    with style():
        figure = new_figure(9.5 if with_memory else 6.5, 0.8 + 3.0 * len(modes))
        axes = figure.subplots(len(modes), 1 + with_memory, squeeze=False)
        for line, mode in zip(axes, modes, strict=True):
            mine = [row for row in done if row.mode == mode]
            _draw(line[0], mine, "images_per_second", f"{mode}, images a second")
            if with_memory:
                _draw(line[1], mine, "peak_mib", f"{mode}, peak memory in MiB")
            line[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=6)
        figure.suptitle(head, fontsize=7)
    return figure


def _draw(axis, rows: Sequence[ModelRow], field: str, title: str) -> None:
    for index, label in enumerate(dict.fromkeys(map(_label, rows))):
        mine = [row for row in rows if _label(row) == label and getattr(row, field) is not None]
        dashes = "-" if index < len(COLOURS) else "--"
        colour = COLOURS[index % len(COLOURS)]
        values = [getattr(row, field) for row in mine]
        axis.plot([row.batch for row in mine], values, dashes, marker="o", ms=3, lw=1, color=colour, label=label)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("batch size")
    axis.set_title(title)


def _label(row: ModelRow) -> str:
    parts = [row.model, "merged" if row.merged else "", row.dtype, row.format, row.execution]
    own = f"{row.convolution} convolution" if row.model.startswith("replknet") else ""
    return ", ".join(part.replace("_", " ") for part in (*parts, own) if part)
