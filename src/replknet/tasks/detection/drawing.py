"""Detections drawn into pictures."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from replknet.tasks.detection.detector import Detections

_OPACITY = 0.45


def draw(pixels: np.ndarray, found: Detections, classes: Sequence[str]) -> np.ndarray:
    """A copy of a picture with masks laid over it, boxes and names.

    Args:
        pixels: `[H, W, 3]` uint8, red first.
        found: in this picture; the best are drawn last and lie on top.
        classes: names by label.

    Returns:
        `[H, W, 3]` uint8.
    """
    canvas = pixels.copy()
    order = range(len(found) - 1, -1, -1)
    if found.masks is not None:
        for index in order:
            mask = found.masks[index]
            blend = (1 - _OPACITY) * canvas[mask] + _OPACITY * np.array(color_of(int(found.labels[index])))
            canvas[mask] = blend.astype(np.uint8)
    picture = Image.fromarray(canvas)
    for index in order:
        label = int(found.labels[index])
        text = f"{classes[label]} {found.scores[index]:.2f}"
        _box(picture, found.boxes[index].tolist(), text, color_of(label))
    return np.asarray(picture)


def color_of(label: int) -> tuple[int, int, int]:
    """A colour of its own for every label; neighbours are far apart on the colour wheel."""
    # Multiples of the golden ratio never come close to each other on a circle.
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618033988749895 % 1, 0.75, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def _box(picture: Image.Image, box: list[float], text: str, color: tuple[int, int, int]) -> None:
    pen = ImageDraw.Draw(picture)
    side = min(picture.size)
    width, font = max(1, round(side / 250)), ImageFont.load_default(max(9, round(side / 35)))
    pen.rectangle(box, outline=color, width=width)
    _, top, right, bottom = pen.textbbox((box[0], box[1]), text, font=font, anchor="lb")
    # Inside the box where there is no room above it, and never beyond the right edge.
    shift = (min(0, picture.width - right), bottom - top if top < 0 else 0)
    place = (box[0] + shift[0], box[1] + shift[1])
    pen.rectangle(pen.textbbox(place, text, font=font, anchor="lb"), fill=color)
    # White on dark colours, black on light ones, by luminance.
    ink = "black" if 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140 else "white"
    pen.text(place, text, fill=ink, font=font, anchor="lb")
