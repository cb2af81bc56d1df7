"""One way to any model: by name, with weights of any origin, with an exact account of what was loaded."""

import difflib
import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from torch import Tensor, nn

import replknet.models.family  # noqa: F401 - registers the models
from replknet._errors import RunError, UsageError
from replknet.models.checkpoints import load_checkpoint, read_state_dict
from replknet.models.download import weights_in_folder


def create_model(
    name: str,
    *,
    weights: str | Path | None = None,
    pretrained: bool = False,
    num_classes: int | None = None,
    in_chans: int | None = None,
    checkpoint_may_differ: str | Iterable[str] = (),
    **kwargs: Any,
) -> nn.Module:
    """Build a model and load its weights.

    Args:
        name: any timm model, `MODEL` or `MODEL.TAG`, or `hf-hub:REPO` or `local-dir:FOLDER`.
        weights: a checkpoint file: of `replknet train`, official, mmpretrain's, timm's, safetensors; or a folder that
            holds the official file of `name`.
        pretrained: load the weights that the name stands for (downloaded unless cached).
        num_classes: outputs of the head; None takes the checkpoint's own, without one timm's default.
        in_chans: channels of the images; None likewise.
        checkpoint_may_differ: names that may differ between `weights` and model, "head" for a new head.
        kwargs: constructor arguments of the model.

    Returns:
        The model in training mode, as timm returns it.

    Raises:
        UsageError: no such model (near names are given) or file, `weights` together with `pretrained`, or an argument
            that the model does not take.
        RunError: weights that do not fit or are damaged.
    """
    if weights is not None and pretrained:
        raise UsageError("give either a weights file or pretrained=True, not both")
    if num_classes is not None and num_classes < 0:
        raise UsageError(f"num_classes must be 0 or more; got {num_classes}")
    _check_name(name)
    if weights is not None and Path(weights).expanduser().is_dir():
        weights = weights_in_folder(weights, name)
    state = None if weights is None else read_state_dict(weights)
    given = {"num_classes": num_classes, "in_chans": in_chans}
    given = {key: value for key, value in given.items() if value is not None}
    if state is not None:
        given = {**_shapes_of(state, name, checkpoint_may_differ), **given}
    model = _build(name, pretrained, {**given, **kwargs})
    if weights is not None:
        load_checkpoint(model, weights, may_differ=checkpoint_may_differ)
    return model


def _build(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except TypeError as error:
        if "unexpected keyword argument" in str(error):
            raise UsageError(f"{name} does not take this argument: {error}") from error
        raise
    except FileNotFoundError as error:
        raise UsageError(f"{name}: {error}") from error
    except (SafetensorError, pickle.UnpicklingError, json.JSONDecodeError) as error:
        # timm opens the files of a folder or repository itself, and its readers do not say which file it was.
        raise RunError(f"{name}: its files are damaged: {error}") from error


def _check_name(name: str) -> None:
    if ":" in name:
        scheme, _, rest = name.partition(":")
        if scheme == "local-dir" and not (Path(rest) / "config.json").is_file():
            raise UsageError(f"{rest} is not a model folder: it has no config.json")
        if scheme not in ("hf-hub", "hf_hub", "local-dir", "timm"):
            raise UsageError(f"unknown scheme {scheme!r} in {name!r}; accepted: hf-hub:REPO, local-dir:FOLDER")
        return
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=4, cutoff=0.6)
        hint = f"near names: {', '.join(near)}" if near else "`replknet models` lists RepLKNets, timm.list_models() all"
        raise UsageError(f"unknown model {base!r}; {hint}")
    tags = [full.partition(".")[2] for full in timm.list_models(f"{base}.*", include_tags=True)]
    if tag and tag not in tags:
        raise UsageError(f"{base} has no weights tagged {tag!r}; known: {', '.join(filter(None, tags)) or 'none'}")


def _shapes_of(state: Mapping[str, Tensor], name: str, may_differ: str | Iterable[str]) -> dict[str, int]:
    """Classes and input channels that a checkpoint shows, for arguments that were left open."""
    if ":" in name:
        return {}
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if cfg is None:
        return {}
    allowed = {may_differ} if isinstance(may_differ, str) else set(may_differ)
    found = {}
    head, stem = getattr(cfg, "classifier", None), getattr(cfg, "first_conv", None)
    if isinstance(head, str) and head not in allowed and (weight := state.get(f"{head}.weight")) is not None:
        found["num_classes"] = weight.shape[0]
    if isinstance(stem, str) and (weight := state.get(f"{stem}.weight")) is not None:
        found["in_chans"] = weight.shape[1]
    return found
