"""Names of the outputs of a classifier: its own, or ImageNet's."""

import functools
from collections.abc import Mapping
from typing import Any

from timm.data.imagenet_info import ImageNetInfo
from torch import nn

# The 22K heads of the release follow the sorted WordNet ids of fall11.tar. A third-party port of the release's files
# (shkarupa-alex/tfreplknet, tests) finds African elephant, n02504458, at 3674, which is its place in this order only.
_SUBSETS = {1000: "imagenet-1k", 21841: "imagenet-22k"}


def class_names(model: nn.Module) -> list[str]:
    """One name for every output of `model`, in order.

    The names that came with the weights (timm's `label_names`, `label_descriptions`, as Hugging Face models bring them)
    win over ImageNet's, which are used for 1000 and 21841 outputs; failing both, the number of the output.
    """
    count = int(getattr(model, "num_classes", 0))
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    return _own_names(cfg, count) or imagenet_class_names(count) or [str(index) for index in range(count)]


@functools.cache
def imagenet_class_names(num_classes: int) -> list[str] | None:
    """WordNet's words for the classes of ImageNet-1K (1000) or ImageNet-22K (21841); None for another number."""
    subset = _SUBSETS.get(num_classes)
    return list(ImageNetInfo(subset).label_descriptions()) if subset else None


def _own_names(cfg: Mapping[str, Any], count: int) -> list[str] | None:
    labels = cfg.get("label_names")
    if not labels or not count:
        return None
    if isinstance(labels, Mapping):  # JSON turns the numbers of the outputs into strings
        labels = [labels.get(index, labels.get(str(index), str(index))) for index in range(count)]
    if len(labels) != count:
        return None
    descriptions = cfg.get("label_descriptions") or {}
    return [str(descriptions.get(label, label)) for label in labels]
