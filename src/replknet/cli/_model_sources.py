"""From a word on the command line to a network: ours, timm's, torchvision's, or a function of the user's own.

`NAME[,option...]`, where NAME is one of

| name | network |
|---|---|
| `replknet_31b`, `convnext_tiny`, `hf-hub:ORG/NAME`, `local-dir:FOLDER` | any timm model |
| `runs/digits/checkpoints/best.ckpt` | a checkpoint of `replknet train`, which knows its network |
| `torchvision:resnet50` | a torchvision classification model |
| `my_package.my_module:build` or `folder/file.py:build` | what `build()` returns, or an `nn.Module` of that name |

and the options are `weights=FILE`, `pretrained`, `merged` (re-parameterised after loading), `label=TEXT`,
`layer=NAME`, and `KEY:=VALUE` for an argument of the constructor, VALUE being JSON.
"""

import hashlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from replknet._errors import RunError, UsageError
from replknet.layers import reparameterize
from replknet.models.checkpoints import load_checkpoint
from replknet.models.factory import create_model
from replknet.tasks.opened_model import describe_checkpoint

_TIMM_SCHEMES = ("hf-hub", "hf_hub", "local-dir", "timm")


@dataclass(frozen=True)
class ModelSource:
    """A parsed model word.

    Attributes:
        name: the network's name.
        weights: checkpoint file, or None.
        pretrained: load the weights that the name stands for.
        merged: re-parameterise after loading.
        label: what figures and files call it.
        layer: layer to look at, None for the last feature map.
        arguments: for the constructor.
        untrained: build the same network, but load no weights.
    """

    name: str
    weights: Path | None = None
    pretrained: bool = False
    merged: bool = False
    label: str = ""
    layer: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    untrained: bool = False

    @classmethod
    def parse(cls, text: str) -> "ModelSource":
        """Read `NAME[,option...]`.

        Raises:
            UsageError: an unknown option or an empty name.
        """
        name, *options = text.split(",")
        if not name:
            raise UsageError(f"{text!r} names no model; expected NAME[,option...]")
        values: dict[str, Any] = {}
        arguments: dict[str, Any] = {}
        for option in options:
            key, has_value, value = option.partition("=")
            if has_value and key.endswith(":"):
                arguments[key[:-1]] = _json(value)
            elif not has_value and key in ("pretrained", "merged"):
                values[key] = True
            elif has_value and key in ("weights", "label", "layer"):
                values[key] = Path(value).expanduser() if key == "weights" else value
            else:
                raise UsageError(
                    f"{text!r}: unknown option {option!r}; known: weights=FILE, pretrained, merged, label=TEXT, "
                    "layer=NAME, KEY:=VALUE"
                )
        label = values.pop("label", "") or _default_label(name, values)
        if _is_checkpoint(name):
            if "weights" in values:
                raise UsageError(f"{text!r} names two files of weights")
            values["weights"] = Path(name).expanduser()
        return cls(name=name, label=label, arguments=arguments, **values)

    def build_untrained(self, seed: int = 0) -> nn.Module:
        """The same network before any training, its initialisation drawn from a seed.

        Raises:
            UsageError: as `build`; or the user's own module holds a layer that cannot initialise itself again.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = replace(self, untrained=True).build()
            if not self.is_own:
                return model
            # Importing the user's file may have drawn random numbers, and does so only once.
            torch.manual_seed(seed)
            return reset_weights(model)

    @property
    def is_trained(self) -> bool:
        """Whether weights are loaded; a user's own function may load some, as only its author knows."""
        return self.weights is not None or self.pretrained or self.is_own

    @property
    def is_checkpoint(self) -> bool:
        """Whether the name is the file of weights."""
        return _is_checkpoint(self.name)

    @property
    def is_own(self) -> bool:
        """Whether it is a user's own `MODULE:FUNCTION`."""
        return (
            not self.is_checkpoint
            and ":" in self.name
            and self.name.partition(":")[0] not in (*_TIMM_SCHEMES, "torchvision")
        )

    def build(self) -> nn.Module:
        """The network with its weights, in eval mode.

        Raises:
            UsageError: no such model, file or function, or weights asked for that the source cannot load.
            RunError: weights that do not fit.
        """
        if self.is_checkpoint and not Path(self.name).expanduser().is_file():
            raise UsageError(f"{self.name}: no such file")
        if self.weights is not None and self.pretrained:
            raise UsageError(f"{self.name}: give either weights=FILE or pretrained, not both")
        scheme, has_scheme, rest = self.name.rpartition(":")
        if has_scheme and scheme == "torchvision":
            model = self._torchvision(rest)
        elif self.is_own:
            model = self._own(scheme, rest)
        else:
            model = self._timm()
        model.eval()
        return reparameterize(model) if self.merged else model

    def describe(self) -> dict[str, Any]:
        """What a result file needs to say to build the network again."""
        return {
            "name": self.name,
            "weights": None if self.weights is None else str(self.weights),
            "weights_sha256": None if self.weights is None else file_digest(self.weights),
            "pretrained": self.pretrained,
            "merged": self.merged,
            "arguments": self.arguments,
        }

    def _timm(self) -> nn.Module:
        """A timm model; a checkpoint of ours adds its classes, constructor arguments and normalisation."""
        told = {} if self.weights is None else describe_checkpoint(self.weights) or {}
        name = str(told.get("model", "")) if self.is_checkpoint else self.name
        if not name:
            raise UsageError(f"{self.weights} does not tell its network; write NAME,weights={self.weights}")
        own = {key: told[key] for key in ("num_classes", "in_chans") if told.get(key) is not None}
        arguments = {**own, **told.get("model_kwargs", {}), **self.arguments}
        weights = None if self.untrained else self.weights
        model: Any = create_model(name, weights=weights, pretrained=self.pretrained and not self.untrained, **arguments)
        if told.get("mean") and told.get("std"):
            config = getattr(model, "pretrained_cfg", None) or {}
            model.pretrained_cfg = {**config, "mean": tuple(told["mean"]), "std": tuple(told["std"])}
        return model

    def _torchvision(self, name: str) -> nn.Module:
        from torchvision.models import get_model, list_models

        if name not in list_models():
            raise UsageError(_unknown(f"torchvision has no model {name!r}", name, list_models()))
        weights = "DEFAULT" if self.pretrained and not self.untrained else None
        arguments = self.arguments
        if name in ("inception_v3", "googlenet") and weights is None:
            # Their own initialisation is announced by a warning and takes half a minute.
            arguments = {"init_weights": False, **arguments}
        try:
            model = get_model(name, weights=weights, **arguments)
        except TypeError as error:
            raise UsageError(f"torchvision:{name} does not take this argument: {error}") from error
        if self.weights is not None and not self.untrained:
            load_checkpoint(model, self.weights)
        return model

    def _own(self, where: str, attribute: str) -> nn.Module:
        if self.pretrained:
            raise UsageError(f"{self.name}: `pretrained` has no meaning for your own function; load weights in it")
        made = _attribute(where, attribute)
        model = made if isinstance(made, nn.Module) else _call(self.name, made, self.arguments)
        if not isinstance(model, nn.Module):
            raise UsageError(f"{self.name} gave a {type(model).__name__}; a torch.nn.Module is needed")
        if self.weights is not None and not self.untrained:
            load_checkpoint(model, self.weights)
        return model


def set_image_size(model: nn.Module, size: tuple[int, int], name: str = "the model") -> None:
    """Make a network with a built-in input size (vision transformers) take images of `size`, in place.

    Raises:
        UsageError: the size does not suit the network's patches or windows.
    """
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    patch = (patch, patch) if isinstance(patch, int) else patch
    if patch and any(side % p for side, p in zip(size, patch, strict=True)):
        below = tuple(max(side // p, 1) * p for side, p in zip(size, patch, strict=True))
        above = tuple(-(-side // p) * p for side, p in zip(size, patch, strict=True))
        raise UsageError(
            f"{name} cuts images into patches of {patch[0]} × {patch[1]}, and {size[0]} × {size[1]} is no multiple; "
            f"use {below[0]} × {below[1]} or {above[0]} × {above[1]}"
        )
    resize = getattr(model, "set_input_size", None)
    if callable(resize):
        try:
            resize(img_size=size)
        except (ValueError, RuntimeError, AssertionError, TypeError) as error:
            raise UsageError(f"{name} cannot take images of {size[0]} × {size[1]}: {error}") from error


def silent_scales(model: nn.Module) -> int:
    """Number of norm weights and layer scales that are (nearly) zero everywhere, as some initialisations leave them."""
    scales = [
        value
        for name, value in model.named_parameters()
        if value.ndim == 1
        and value.numel() > 1
        and name.rpartition(".")[2] in ("weight", "gamma", "gamma_1", "gamma_2")
    ]
    return sum(bool(value.detach().abs().max() < 1e-4) for value in scales)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reset_weights(model: nn.Module) -> nn.Module:
    """Let every layer draw its own initialisation again, in place.

    Raises:
        UsageError: a parameter belongs to a layer that cannot initialise itself.
    """
    for name, module in model.named_modules():
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(reset):
            reset()
        elif next(module.parameters(recurse=False), None) is not None:
            raise UsageError(f"layer {name or 'the model'} ({type(module).__name__}) cannot reset its parameters")
    return model


def _is_checkpoint(name: str) -> bool:
    return Path(name).suffix in (".ckpt", ".pth", ".pt", ".safetensors", ".bin", ".tar")


def _default_label(name: str, values: dict[str, Any]) -> str:
    short = name.rpartition("/")[2] or name
    if _is_checkpoint(name):
        folder = Path(name).absolute().parent
        run = folder.parent if folder.name == "checkpoints" else folder
        short = f"{run.name} {Path(name).stem}"
    return short + (" merged" if values.get("merged") else "")


def _json(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _unknown(what: str, name: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=4)
    return f"{what}; " + (f"near names: {', '.join(near)}" if near else f"it has {', '.join(known[:8])}, ...")


def _attribute(where: str, attribute: str) -> Any:
    module = _import_file(Path(where)) if where.endswith(".py") else _import(where)
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            names = [name for name in dir(value) if not name.startswith("_")]
            raise UsageError(_unknown(f"{where} has no {attribute!r}", attribute, names))
        value = getattr(value, part)
    return value


def _import(name: str) -> Any:
    # `python -m` puts the working directory on the path, an installed command does not.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise UsageError(
                f"there is no module {name!r}; expected a timm model, torchvision:NAME, MODULE:FUNCTION or "
                "FILE.py:FUNCTION"
            ) from error
        raise


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _call(name: str, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    if not callable(function):
        raise UsageError(f"{name} is a {type(function).__name__}; a function or class that makes a module is needed")
    try:
        return function(**arguments)
    except TypeError as error:
        raise RunError(f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())}) failed: {error}") from error
