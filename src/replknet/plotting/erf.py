"""Figures of effective receptive fields: heatmap, several models on one scale, radial profiles, overlay on an image.

Colours come from `cividis`, which is perceptually uniform and reads the same with any colour vision and in grey.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from replknet.analysis.erf_measures import area_ratios, log_matrix, radial_profile
from replknet.plotting._figures import COLOURS, new_figure, save, style

__all__ = ["grid", "heatmap", "overlay", "radial_profiles", "save"]

Scale = Literal["release", "log", "linear"]

COLOUR_MAP = "cividis"
_DECADES = 4
_SCALE_LABELS = {
    "release": "contribution, log10(x + 1) / max",
    "log": "contribution / largest",
    "linear": "contribution / largest",
}


def heatmap(
    matrix: Any,
    *,
    scale: Scale = "log",
    title: str | None = None,
    squares: Sequence[float] = (0.5, 0.99),
    figure: Figure | None = None,
) -> Figure:
    """One contribution matrix as a picture with a scale bar and the squares that hold `squares` of the total.

    Args:
        matrix: `[H, W]`, or an `ErfResult`; of a signed matrix the magnitude is drawn.
        scale: "log" spans four decades below the largest value, "linear" starts at 0, "release" draws
            `log10(x + 1) / max` as the official scripts do, which looks different at different scales of the gradient.
        title: above the picture.
        squares: shares of the raw total whose smallest centred squares are outlined; none: `()`.
        figure: draw into this one instead of a new one.
    """
    data = _array(matrix)
    with style():
        figure = figure if figure is not None else new_figure(3.6, 3.9)
        axes = figure.add_subplot()
        image = _draw(axes, data, scale, _norm(scale))
        _outline(axes, data, squares)
        _scale_bar(axes, data.shape)
        if title:
            axes.set_title(title)
        bar = figure.colorbar(image, ax=axes, orientation="horizontal", fraction=0.05, pad=0.03)
        bar.set_label(_SCALE_LABELS[scale])
    return figure


def grid(
    matrices: Mapping[str, Any],
    *,
    scale: Scale = "log",
    squares: Sequence[float] = (0.5, 0.99),
    columns: int | None = None,
) -> Figure:
    """Several contribution matrices on one scale, named by their keys. Each is divided by its own largest value."""
    if not matrices:
        raise ValueError("there is nothing to draw: give at least one matrix")
    arrays = {name: _array(matrix) for name, matrix in matrices.items()}
    columns = columns or -(-len(arrays) // -(-len(arrays) // 4))
    rows = -(-len(arrays) // columns)
    with style():
        figure = new_figure(2.3 * columns, 2.55 * rows + 0.5)
        norm = _norm(scale)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in panels[len(arrays) :]:
            axes.set_axis_off()
        for axes, (name, data) in zip(panels, arrays.items(), strict=False):
            image = _draw(axes, data, scale, norm)
            _outline(axes, data, squares, legend=axes is panels[0])
            _scale_bar(axes, data.shape)
            axes.set_title(name)
        bar = figure.colorbar(image, ax=panels.tolist(), orientation="horizontal", fraction=0.05, pad=0.02, aspect=40)
        bar.set_label(_SCALE_LABELS[scale])
    return figure


def radial_profiles(matrices: Mapping[str, Any]) -> Figure:
    """Mean contribution and cumulative mass by distance from the centre, one line a matrix."""
    if not matrices:
        raise ValueError("there is nothing to draw: give at least one matrix")
    with style():
        figure = new_figure(6.8, 2.8)
        left, right = figure.subplots(1, 2)
        for index, (name, matrix) in enumerate(matrices.items()):
            profile = radial_profile(_array(matrix))
            look: dict[str, Any] = {
                "color": COLOURS[index % len(COLOURS)],
                "linestyle": ("-", "--", "-.", ":")[index // len(COLOURS) % 4],
                "label": name,
                "linewidth": 1.4,
            }
            positive = np.where(profile.mean > 0, profile.mean, np.nan)
            left.plot(profile.radius, positive / np.nanmax(positive), **look)
            right.plot(profile.radius, profile.cumulative, **look)
        left.set(yscale="log", xlabel="distance from the centre [pixels]", ylabel="mean contribution / largest")
        right.set(xlabel="distance from the centre [pixels]", ylabel="share of the total within", ylim=(0, 1.02))
        right.axhline(0.5, color="0.8", linewidth=0.8, zorder=0)
        right.legend(frameon=False, loc="lower right")
        for axes in (left, right):
            axes.set_xlim(left=0)
    return figure


def overlay(
    matrix: Any, image: np.ndarray, *, title: str | None = None, squares: Sequence[float] = (0.2, 0.5, 0.99)
) -> Figure:
    """The contribution over the input: bright where the network looks, dimmed elsewhere.

    Args:
        matrix: `[H, W]` or an `ErfResult`.
        image: `[H, W, 3]`, uint8 or float in 0–1, the size of the matrix.
        title: above the picture.
        squares: shares of the total whose smallest centred squares are outlined.
    """
    data, picture = _array(matrix), np.asarray(image)
    if picture.shape[:2] != data.shape or picture.ndim != 3:
        raise ValueError(f"the image is [H, W, 3] of the matrix's size {data.shape}; got {picture.shape}")
    colour = picture / 255.0 if picture.dtype == np.uint8 else np.clip(picture, 0, 1)
    grey = colour[..., :3].mean(-1, keepdims=True)
    light = _brightness(data)[..., None]
    with style():
        figure = new_figure(3.6, 3.75)
        axes = figure.add_subplot()
        axes.imshow(grey * 0.2 + light * (colour[..., :3] - grey * 0.2), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        _outline(axes, data, squares)
        _scale_bar(axes, data.shape)
        if title:
            axes.set_title(title)
    return figure


def _array(matrix: Any) -> np.ndarray:
    data = np.abs(np.asarray(getattr(matrix, "matrix", matrix), dtype=np.float64))
    if data.ndim != 2 or not data.any() or not np.isfinite(data).all():
        raise ValueError(f"a contribution matrix is [H, W], finite and not all zero; got shape {data.shape}")
    return data


def _brightness(data: np.ndarray) -> np.ndarray:
    """0–1 by the contribution's local mean over 1/32 of the image: single pixels would only speckle the picture."""
    size = max(min(data.shape) // 32, 1) | 1
    smooth = data
    for axis in (0, 1):
        padded = np.pad(smooth, [(size // 2, size // 2) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        smooth = np.lib.stride_tricks.sliding_window_view(padded, size, axis=axis).mean(-1)
    # The square root keeps the surroundings visible where the centre dominates.
    return np.sqrt(smooth / smooth.max())


def _norm(scale: Scale) -> Normalize:
    if scale not in _SCALE_LABELS:
        raise ValueError(f"scale is one of {', '.join(_SCALE_LABELS)}; got {scale!r}")
    if scale == "log":
        return LogNorm(10.0**-_DECADES, 1, clip=True)
    return Normalize(0, 1)


def _draw(axes: Axes, data: np.ndarray, scale: Scale, norm: Normalize) -> AxesImage:
    shown = log_matrix(data) if scale == "release" else data / data.max()
    image = axes.imshow(shown, cmap=COLOUR_MAP, norm=norm, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def _outline(axes: Axes, data: np.ndarray, squares: Sequence[float], *, legend: bool = True) -> None:
    h, w = data.shape
    dashes = ("-", "--", ":", "-.")
    for index, area in enumerate(area_ratios(data, squares) if squares else ()):
        if area.side is None:
            continue
        corner = (w // 2 - area.side / 2, h // 2 - area.side / 2)
        label = f"{area.threshold:.0%}"
        # White on black is seen on any colour of the map.
        axes.add_patch(Rectangle(corner, area.side, area.side, fill=False, edgecolor="black", linewidth=1.6))
        line = Rectangle(corner, area.side, area.side, fill=False, edgecolor="white", linewidth=0.9, label=label)
        line.set_linestyle(dashes[index % len(dashes)])
        axes.add_patch(line)
    if legend and axes.patches:
        box = axes.legend(loc="upper right", handlelength=1.6, handleheight=0.9, framealpha=0.75, facecolor="black")
        for text in box.get_texts():
            text.set_color("white")


def _scale_bar(axes: Axes, shape: tuple[int, ...]) -> None:
    h, w = shape[:2]
    nice = [step * 10**power for power in range(5) for step in (1, 2, 5)]
    length = max((value for value in nice if value <= w / 4), default=1)
    x, y, thick = 0.04 * w, 0.955 * h, max(0.012 * h, 0.5)
    axes.add_patch(Rectangle((x, y), length, thick, facecolor="white", edgecolor="black", linewidth=0.5))
    axes.text(x + length / 2, y - 0.012 * h, f"{length} px", color="white", ha="center", va="bottom", fontsize=8)
