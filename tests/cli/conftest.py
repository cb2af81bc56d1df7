"""Pictures for command-line tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_sample_images


@pytest.fixture(scope="session")
def write_pictures() -> Callable[..., None]:
    """`write_pictures(folder, count, pattern)` puts cuttings of a photograph there."""
    photograph = Image.fromarray(load_sample_images().images[0])

    def write(folder: Path, count: int, pattern: str = "{}.jpg") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(1, count + 1):
            photograph.crop((50 * number, 20, 50 * number + 120, 140)).save(folder / pattern.format(number), "JPEG")

    return write
