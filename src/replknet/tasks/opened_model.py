"""A network together with all that is needed to use it: input format and class names."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from replknet._errors import UsageError
from replknet.data.class_names import class_names, imagenet_class_names
from replknet.data.transforms import CropMode, ImageFormat
from replknet.layers import reparameterize
from replknet.models.checkpoints import load_checkpoint, read_state_dict
from replknet.models.factory import create_model


@dataclass(frozen=True)
class OpenedModel:
    """A classifier ready for use, in evaluation mode.

    Attributes:
        model: images `[N, C, H, W]` → logits `[N, outputs]`.
        name: of the architecture.
        weights: where its weights come from: a file name, "pretrained" or "untrained".
        image: input format.
        own_names: class names that were stored with the weights, or None.
        merged: whether it has been re-parameterised here.
    """

    model: nn.Module
    name: str
    weights: str
    image: ImageFormat
    own_names: list[str] | None
    merged: bool = False

    @property
    def outputs(self) -> int:
        return int(self.model.num_classes)  # type: ignore[arg-type]

    def names(self) -> list[str]:
        """A name for every output: its own, ImageNet's for an ImageNet head, else its number."""
        return self.own_names if self.own_names is not None else class_names(self.model)


def open_model(
    name: str | None = None,
    *,
    weights: str | Path | None = None,
    pretrained: bool | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_mode: CropMode | None = None,
    crop_pct: float | None = None,
    use_ema: bool = True,
    merged: bool = False,
    **model_kwargs: Any,
) -> OpenedModel:
    """Build a network with its weights and find out how to feed it.

    Args:
        name: as for `replknet.models.factory.create_model`; may be left out where `weights` is a checkpoint of ours,
            which knows its architecture, classes and input format.
        weights, num_classes, in_chans, model_kwargs: as for `create_model`.
        pretrained: load the weights that `name` stands for; by default those of a folder (`local-dir:`) or of a
            repository (`hf-hub:`) unless `weights` names others.
        image_size, mean, std, crop_mode, crop_pct: instead of what the weights ask for.
        use_ema: of a checkpoint with both, take the averaged weights.
        merged: re-parameterise.

    Raises:
        UsageError: no name and none in the weights, or a request that cannot be met.
        RunError: the weights are damaged.
    """
    described = describe_checkpoint(weights) if weights is not None else None
    if name is None:
        if described is None:
            if weights is None:
                raise UsageError("no model was named; name one, for example replknet_31b")
            read_state_dict(weights)  # a damaged file is told as such
            raise UsageError(f"{weights} does not tell its architecture; name it, for example replknet_31b")
        name = str(described["model"])
    if described is not None:
        num_classes = described.get("num_classes") if num_classes is None else num_classes
        in_chans = described.get("in_chans") if in_chans is None else in_chans
        model_kwargs = {**described.get("model_kwargs", {}), **model_kwargs}
    if pretrained is None:
        pretrained = weights is None and stands_for_weights(name)
    model = create_model(
        name, weights=weights, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **model_kwargs
    ).eval()
    if weights is not None and not use_ema:
        load_checkpoint(model, weights, use_ema=False)
    if not getattr(model, "num_classes", 0):
        raise UsageError(f"{name} has no classifier (0 outputs)")
    image = _image_format(model, name, described)
    wanted = {"size": image_size, "mean": mean, "std": std, "crop_mode": crop_mode, "crop_pct": crop_pct}
    image = replace(image, **{key: value for key, value in wanted.items() if value is not None})
    own_names = _stored_names(described, model)
    if merged:
        model = reparameterize(model)
    origin = Path(weights).name if weights is not None else ("pretrained" if pretrained else "untrained")
    return OpenedModel(model, name, origin, image, own_names, merged)


def stands_for_weights(name: str) -> bool:
    """Whether a name is that of a folder (`local-dir:`) or repository (`hf-hub:`) with weights."""
    return name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))


def describe_checkpoint(path: str | Path) -> dict[str, Any] | None:
    """What a checkpoint of `replknet train` says about its network, or None for any other file."""
    path = Path(path).expanduser()
    if not path.is_file() or path.suffix == ".safetensors":
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # Anything that torch cannot read is not ours; loading the weights will say what is wrong with it.
    except Exception:  # noqa: BLE001
        return None
    described = content.get("replknet") if isinstance(content, dict) else None
    return described if isinstance(described, dict) and "model" in described else None


def _stored_names(described: dict[str, Any] | None, model: nn.Module) -> list[str] | None:
    if described is not None and described.get("class_names"):
        return [str(name) for name in described["class_names"]]
    outputs = int(getattr(model, "num_classes", 0))
    names = class_names(model)
    is_generic = names in (imagenet_class_names(outputs), [str(index) for index in range(outputs)])
    return None if is_generic else names


def _image_format(model: nn.Module, name: str, described: dict[str, Any] | None) -> ImageFormat:
    cfg: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
    chans = int((described or {}).get("in_chans") or getattr(model, "in_chans", 0) or _input_channels(model))
    if described is not None:
        return ImageFormat(
            size=int(described["image_size"]), mean=described["mean"], std=described["std"], in_chans=chans
        )
    # Folders and repositories state their crop; the release's rule goes by the size that was asked for.
    own_rule = name.startswith("replknet")
    return ImageFormat(
        size=int(cfg.get("input_size", (3, 224, 224))[-1]),
        mean=cfg.get("mean", ImageFormat.mean),
        std=cfg.get("std", ImageFormat.std),
        in_chans=chans,
        crop_mode="auto" if own_rule else cfg.get("crop_mode", "center"),
        crop_pct=0.875 if own_rule else cfg.get("crop_pct", 0.875),
        interpolation=cfg.get("interpolation", "bicubic"),
    )


def _input_channels(model: nn.Module) -> int:
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    first = next(convolutions, None)
    return first.in_channels if first is not None else 3
