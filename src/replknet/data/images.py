"""Reading one picture: any PIL mode to RGB or grey, and one exception for everything that can be wrong with a file."""

import io
import os
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from replknet._errors import RunError

# torchvision's list; compared in lower case, so .JPEG counts.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class BrokenImageError(RunError):
    """A picture that cannot be read; the message names it and says why."""

    def __init__(self, message: str):
        # A DataLoader rebuilds a worker's exception from its whole traceback, whose last line is the message.
        last = message.strip().splitlines()[-1]
        super().__init__(last.rpartition("BrokenImageError: ")[2])


def is_image_name(name: str) -> bool:
    """By suffix, whatever its case; hidden files (a leading dot) are not pictures."""
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def load_image(
    source: str | os.PathLike | bytes | BinaryIO | Image.Image, *, in_chans: int = 3, name: str = ""
) -> Image.Image:
    """Decode a picture completely.

    CMYK, palette and alpha pictures become RGB as PIL converts them (alpha is dropped), 16-bit ones are scaled to 8
    bits. The EXIF orientation is ignored, as the release's loader ignores it.

    Args:
        source: a path, the bytes of a file, an open binary file, or a PIL picture.
        in_chans: 3 for RGB, 1 for grey.
        name: what the error calls the picture; its path by default.

    Raises:
        BrokenImageError: missing, empty, truncated, not a picture, too large to be safe, or of an unusable mode.
    """
    name = name or (str(source) if isinstance(source, (str, os.PathLike)) else "picture")
    try:
        if isinstance(source, Image.Image):
            return _convert(source, in_chans)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            picture.load()
            return _convert(picture, in_chans)
    # PIL's decoders raise SyntaxError, struct.error, zlib.error and others on hostile files: all of them mean "broken".
    except Exception as error:
        raise BrokenImageError(f"cannot read {name}: {_reason(source, error)}") from error


def _convert(picture: Image.Image, in_chans: int) -> Image.Image:
    mode = "RGB" if in_chans == 3 else "L"
    if picture.mode.startswith("I"):
        # PIL clips 16-bit values at 255, which turns nearly every such picture white.
        picture = picture.point(lambda value: value * (1 / 257), "L") if picture.mode == "I;16" else _scale_int(picture)
    elif picture.mode == "F":
        raise ValueError("32-bit float pixels have no defined range; save it with 8 or 16 bits")
    elif picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture if picture.mode == mode else picture.convert(mode)


def _scale_int(picture: Image.Image) -> Image.Image:
    import numpy as np

    pixels = np.asarray(picture).astype("int64")
    high = 255 if pixels.max(initial=0) <= 255 else 65535
    return Image.fromarray((pixels.clip(0, high) * 255 // high).astype("uint8"))


def _reason(source: object, error: Exception) -> str:
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.exists():
            return "a broken link" if path.is_symlink() else "no such file"
        if path.is_dir():
            return "a folder"
        if path.stat().st_size == 0:
            return "the file is empty"
    if isinstance(source, bytes) and not source:
        return "the file is empty"
    text = " ".join(str(error).split()) or type(error).__name__
    return "not a picture in a known format" if text.startswith("cannot identify image file") else text
