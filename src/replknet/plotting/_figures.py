"""What all figures share: a quiet style, and saving without leaving half a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from replknet._errors import UsageError
from replknet._files import replacing

FORMATS = ("png", "svg", "pdf")

# Okabe and Ito's palette, which readers with any colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    # Text stays text in vector files, and names in them do not change from run to run.
    "svg.fonttype": "none",
    "svg.hashsalt": "replknet",
    "pdf.fonttype": 42,
}


@contextmanager
def style() -> Iterator[None]:
    """The figures' style, inside the block only."""
    with mpl.rc_context(_STYLE):
        yield


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, in inches, that no pyplot state keeps alive."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path | str, *, dpi: int = 200) -> Path:
    """Write a figure as PNG, SVG or PDF, by the name's ending, atomically."""
    path = Path(path)
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise UsageError(f"figures are written as {', '.join(FORMATS)}; got {path.name!r}")
    # Without dates, the same figure is the same file.
    metadata = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[suffix]
    with style(), replacing(path) as temporary:
        figure.savefig(temporary, format=suffix, dpi=dpi, metadata=metadata)
    return path
