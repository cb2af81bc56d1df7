"""The embedded data set: real pictures that need no download."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from replknet._errors import UsageError


class DigitsSet:
    """1797 handwritten digits of 43 people, 8×8 pixels in 17 grey levels, shipped with scikit-learn.

    1437 for training and 360 for validation, each class in equal shares, always the same ones.

    Source: Alpaydin, Kaynak 1998, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository.
    """

    def __init__(self, split: str):
        if split not in ("train", "validation"):
            raise UsageError(f"digits: split {split!r}; it has train and validation")
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise UsageError("digits comes with scikit-learn: pip install 'replknet[demo]'") from error
        digits: Any = load_digits()
        parts = train_test_split(
            np.arange(len(digits.target)), test_size=360, random_state=0, stratify=digits.target, shuffle=True
        )
        self._indices = np.sort(parts[0] if split == "train" else parts[1])
        self._pixels = np.rint(digits.images[self._indices] * (255 / 16)).astype(np.uint8)
        self.labels = digits.target[self._indices].astype(np.int64)
        self.class_names = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"digits[{self._indices[index]}]"

    def read(self, index: int, in_chans: int) -> tuple[Image.Image, int]:
        picture = Image.fromarray(self._pixels[index])
        return (picture if in_chans == 1 else picture.convert("RGB")), int(self.labels[index])

    def save(self, folder: Path) -> None:
        """Write the pictures as `folder/CLASS/NUMBER.png`, as a small real folder to try commands on."""
        for index, label in enumerate(self.labels):
            target = folder / str(label)
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(self._pixels[index]).save(target / f"{self._indices[index]:04d}.png")
