"""A few real pictures that every installation has, for checks that need more than noise."""

from pathlib import Path

from matplotlib import cbook
from PIL import Image, ImageOps

from replknet.data.images import load_image


def sample_pictures() -> list[Image.Image]:
    """Eight RGB views of the photograph that comes with matplotlib: whole, mirrored, four quarters, centre, rotated.

    Source: portrait of Grace Hopper, public domain, in matplotlib's sample data.
    """
    whole = load_image(Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)))  # type: ignore[arg-type]
    width, height = whole.size
    x, y = width // 2, height // 2
    quarters = [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]
    centre = (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
    views = [whole, ImageOps.mirror(whole), *(whole.crop(box) for box in (*quarters, centre))]
    return [*views, whole.rotate(90, expand=True)]
