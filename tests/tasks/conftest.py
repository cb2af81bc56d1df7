"""Small real images, small real networks: what a training test can afford."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from replknet.data import Augmentation, LoaderConfig
from replknet.data.embedded import DigitsSet
from replknet.tasks.train import TrainConfig

# A ResNet of timm's own tests: batch norm, 0.4 M parameters.
SMALL = "test_resnet"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Bits are compared at one number of threads, that of the module's shared reference run included."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory) -> Path:
    """train/ with 64 and val/ with 20 handwritten digits as PNG files, in ten class folders."""
    root = tmp_path_factory.mktemp("digits")
    for split, name, count in (("train", "train", 64), ("validation", "val", 20)):
        digits = DigitsSet(split)
        kept = []
        for label in range(10):
            kept += [int(i) for i in (digits.labels == label).nonzero()[0][: -(-count // 10)]]
        kept = sorted(kept[: count // 10 * 10] + kept[count // 10 * 10 :])[:count]
        digits._indices, digits._pixels, digits.labels = (
            digits._indices[kept],
            digits._pixels[kept],
            digits.labels[kept],
        )
        digits.save(root / name)
    return root


@pytest.fixture(scope="session")
def small_config() -> Callable[..., TrainConfig]:
    """`small_config(folder, run, **options)`: three epochs of eight steps with all that draws random numbers."""

    def make(folder: Path | str, run: Path, **options: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "model": SMALL,
            "data": str(folder),
            "output": str(run),
            "image_size": 16,
            "epochs": 3,
            "global_batch": 8,
            "lr": 2e-3,
            "warmup_epochs": 1,
            "mixup": 0.8,
            "cutmix": 1.0,
            "drop_path": 0.2,
            "ema_decay": 0.9,
            "augmentation": Augmentation(erasing=0.25),
            "loader": LoaderConfig(workers=0),
            "log_every": 1,
            "progress": False,
        }
        return TrainConfig(**(defaults | options))

    return make
