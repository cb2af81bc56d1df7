"""Figure of operator measurements: time of each method on each case beside the roofline's floor."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from replknet.benchmark.depthwise_conv2d import Row
from replknet.plotting._figures import COLOURS, new_figure, style

_MARKERS = "osD^vP*X<"


def op_speed_figure(rows: Sequence[Row], head: str) -> Figure:
    """One panel a pass and kind of input; a column a case; medians with the 20th to the 80th percentile."""
    panels = list(dict.fromkeys((row.pass_, row.dtype, row.format) for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    cases = [[str(row.case) for row in rows if (row.pass_, row.dtype, row.format) == panel] for panel in panels]
    columns = max(len(set(names)) for names in cases)
    same = all(list(dict.fromkeys(names)) == list(dict.fromkeys(cases[0])) for names in cases)
    with style():
        figure = new_figure(max(5.0, 1.6 + 0.42 * columns), 1.9 + (1.6 if same else 2.7) * len(panels))
        axes = figure.subplots(len(panels), 1, squeeze=False, sharex=same)[:, 0]
        for axis, panel in zip(axes, panels, strict=True):
            _draw(axis, [row for row in rows if (row.pass_, row.dtype, row.format) == panel], methods)
            axis.set_title(", ".join(panel).replace("_", " "))
        axes[0].legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1.12), frameon=False)
        figure.suptitle(head.replace("; ", "\n"), fontsize=7)
    return figure


def _draw(axis, rows: Sequence[Row], methods: Sequence[str]) -> None:
    cases = list(dict.fromkeys(str(row.case) for row in rows))
    for index, method in enumerate(methods):
        mine = [row for row in rows if row.method == method and row.median_us is not None]
        places = [cases.index(str(row.case)) + 0.07 * (index - len(methods) / 2) for row in mine]
        medians = [row.median_us or 0.0 for row in mine]
        spread = [
            [max(0.0, (row.median_us or 0) - (row.p20_us or 0)) for row in mine],
            [max(0.0, (row.p80_us or 0) - (row.median_us or 0)) for row in mine],
        ]
        marker, colour = _MARKERS[index % len(_MARKERS)], COLOURS[index % len(COLOURS)]
        axis.errorbar(
            places, medians, yerr=spread, fmt=marker, ms=4, lw=1, color=colour, label=method.replace("_", " ")
        )
    floors = {str(row.case): row.floor_us for row in rows}
    axis.hlines(
        list(floors.values()),
        [cases.index(case) - 0.4 for case in floors],
        [cases.index(case) + 0.4 for case in floors],
        color="0.4",
        lw=1,
        label="floor",
    )
    axis.set_yscale("log")
    axis.set_ylabel("µs")
    axis.set_xticks(range(len(cases)), cases, rotation=60, ha="right")
    axis.margins(x=0.02)
