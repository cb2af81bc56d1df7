"""Small folders of real pictures for the data tests."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images


@pytest.fixture(scope="session")
def photographs() -> list[Image.Image]:
    """Two photographs, 427×640 pixels."""
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


@pytest.fixture(scope="session")
def write_classes(photographs) -> Callable[[Path, dict[str, int]], Path]:
    """`write_classes(root, {name: count})` puts different cuttings of the photographs at `root/name/NUMBER.png`."""

    def write(root: Path, counts: dict[str, int]) -> Path:
        generator = np.random.default_rng(0)
        for number, (name, count) in enumerate(counts.items()):
            (root / name).mkdir(parents=True)
            for index in range(count):
                left, top = (int(value) for value in generator.integers(0, (580, 370)))
                box = (left, top, left + 48, top + 40)
                photographs[number % len(photographs)].crop(box).save(root / name / f"{index:03d}.png")
        return root

    return write
