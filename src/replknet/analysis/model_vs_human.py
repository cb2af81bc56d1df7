"""Any classifier as a model of the model-vs-human toolbox, with its own mean and standard deviation.

The toolbox hands out pictures normalised with ImageNet's mean and standard deviation, whatever a model was trained
with. The wrapper takes that back and applies the model's own.

Source: github.com/bethgelab/model-vs-human (Geirhos et al. 2021, arXiv:2106.07411), which has to be installed.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from replknet._errors import UsageError
from replknet.data.transforms import IMAGENET_MEAN, IMAGENET_STD


def register_with_model_vs_human(
    name: str,
    build: Callable[[], nn.Module],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | tuple[int, int] | None = None,
) -> None:
    """Make `build()` known to model-vs-human as `name`.

        register_with_model_vs_human("replknet_31b", lambda: create_model("replknet_31b", weights="31b.pth"))
        options = {"batch_size": 16, "num_workers": 4, "print_predictions": True}
        modelvshuman.Evaluate()(["replknet_31b"], ["cue-conflict"], **options)

    Args:
        name: a Python identifier that is no torchvision model's name: the toolbox would take torchvision's model.
        build: makes the network when the toolbox asks for it.
        mean, std: of the network's normalisation, of values in 0–1; None: what the network's `pretrained_cfg` says
            (timm and replknet models have one), else ImageNet's.
        size: pixels to resize the toolbox's 224 × 224 pictures to, for networks of another fixed size.

    Raises:
        UsageError: model-vs-human is not installed, or the name cannot be used.
    """
    registry, zoo = _toolbox()
    if not name.isidentifier():
        raise UsageError(
            f"{name!r} cannot be a name in model-vs-human: it has to be a Python identifier, my_model for one"
        )
    if hasattr(importlib.import_module("torchvision.models"), name):
        raise UsageError(f"{name!r} is a torchvision name, which model-vs-human would take instead; choose another")
    if name in registry.list_models("pytorch") and not getattr(getattr(zoo, name, None), "from_replknet", False):
        raise UsageError(f"model-vs-human has a model {name!r} of its own; choose another name")

    def make(model_name: str, *_args: Any) -> "ToolboxModel":
        model = build()
        config = getattr(model, "pretrained_cfg", None) or {}
        own_mean = mean if mean is not None else config.get("mean", IMAGENET_MEAN)
        own_std = std if std is not None else config.get("std", IMAGENET_STD)
        return ToolboxModel(model, model_name, own_mean, own_std, size)

    make.__name__ = name
    make.from_replknet = True  # pyright: ignore[reportFunctionMemberAccess]
    if name not in registry.list_models("pytorch"):
        registry.register_model("pytorch")(make)
    # The toolbox looks its models up by name in this module.
    setattr(zoo, name, make)


class ToolboxModel:
    """What model-vs-human's evaluator asks of a PyTorch model."""

    def __init__(
        self,
        model: nn.Module,
        model_name: str,
        mean: Sequence[float],
        std: Sequence[float],
        size: int | tuple[int, int] | None = None,
    ) -> None:
        self.device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device).eval()
        self.model_name = model_name
        self._size = (size, size) if isinstance(size, int) else size
        # x = (picture - theirs) / theirs_std  →  (picture - own) / own_std, in one step.
        theirs, theirs_std = _column(IMAGENET_MEAN), _column(IMAGENET_STD)
        self._scale = (theirs_std / _column(std)).to(self.device)
        self._shift = ((theirs - _column(mean)) / _column(std)).to(self.device)

    def forward_batch(self, images: Tensor) -> np.ndarray:
        """`[N, 3, H, W]` normalised with ImageNet's mean and standard deviation, to logits `[N, 1000]`."""
        x = images.to(self.device) * self._scale + self._shift
        if self._size is not None and tuple(x.shape[2:]) != self._size:
            x = nn.functional.interpolate(x, self._size, mode="bicubic", antialias=True, align_corners=False)
        with torch.no_grad():
            return self.to_numpy(self.model(x))

    def softmax(self, logits: np.ndarray) -> np.ndarray:
        """Probabilities `[N, 1000]`."""
        return torch.from_numpy(logits).softmax(1).numpy()

    def to_numpy(self, x: Tensor) -> np.ndarray:
        """A tensor as float32 array."""
        return x.detach().float().cpu().numpy()


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(tuple(values), dtype=torch.float32).view(1, -1, 1, 1)


def _toolbox() -> tuple[Any, Any]:
    try:
        registry = importlib.import_module("modelvshuman.models.registry")
        zoo = importlib.import_module("modelvshuman.models.pytorch.model_zoo")
    except ImportError as error:
        raise UsageError(
            f"model-vs-human cannot be imported ({error}); install it as github.com/bethgelab/model-vs-human says, or "
            "use `replknet shape-bias`, which needs none of it"
        ) from error
    return registry, zoo
