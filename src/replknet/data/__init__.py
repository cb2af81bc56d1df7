"""Data: pictures from folders, shards, sets and streams to batches.

What training code has to know: batches are `(images, labels)`; a validation label equal to `IGNORE` (-100) is padding
or a skipped broken picture and must not be counted.
"""

from typing import TYPE_CHECKING, Any

from replknet.data.datasets import open_dataset
from replknet.data.images import BrokenImageError, load_image
from replknet.data.loaders import LoaderConfig, evaluation_loader
from replknet.data.meter import Throughput, ThroughputMeter
from replknet.data.sampler import EvaluationSampler, StatefulDistributedSampler
from replknet.data.samples import IGNORE
from replknet.data.transforms import (
    DIGIT_AUGMENTATION,
    IMAGENET_MEAN,
    IMAGENET_STD,
    NO_AUGMENTATION,
    Augmentation,
    ImageFormat,
    evaluation_transform,
    training_transform,
)

if TYPE_CHECKING:
    from replknet.data.module import ImageData

__all__ = [
    "DIGIT_AUGMENTATION",
    "IGNORE",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "NO_AUGMENTATION",
    "Augmentation",
    "BrokenImageError",
    "EvaluationSampler",
    "ImageData",
    "ImageFormat",
    "LoaderConfig",
    "StatefulDistributedSampler",
    "Throughput",
    "ThroughputMeter",
    "evaluation_loader",
    "evaluation_transform",
    "load_image",
    "open_dataset",
    "training_transform",
]


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import; who evaluates or predicts does not need it.
    if name == "ImageData":
        from replknet.data.module import ImageData

        return ImageData
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
