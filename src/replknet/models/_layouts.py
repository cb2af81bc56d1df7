"""Names of parameters: wrappers, prefixes and the layouts of other projects, all brought to the release's names.

| met in | shape |
|---|---|
| the release | raw, or under `model`, `module`, `state_dict`, `model_ema`; prefixes `module.`, `backbone.` |
| 22K weights | `head.cls_22k.*` |
| mmpretrain | `backbone.*`, the final norm as `backbone.stages.3.norm.*`, the head as `head.fc.*` |
| Lightning | under `state_dict` with prefix `model.`; our moving average under `model_ema` |
| compiled and distributed models | prefixes `_orig_mod.`, `module.` |
| timm's feature wrappers | `stages_0.*`, `transitions_0.*`, or prefix `model.` |
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from replknet._errors import RunError

_EMA = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
_PLAIN = ("state_dict", "model", "module", "model_state_dict", "net", "weights")
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "net.")
_COUNTERS = ("n_averaged", "steps")
"""Scalars that moving averages of torch and mmengine keep among the weights."""
_FLAT = re.compile(r"^(stages|transitions)_(\d+)\.")


def unwrap(contents: Mapping, *, use_ema: bool, source: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors inside a checkpoint, and the wrappers that were taken off.

    Raises:
        RunError: there are none.
    """
    wrappers: list[str] = []
    lightning = "pytorch-lightning_version" in contents
    while key := _wrapper(contents, use_ema):
        wrappers.append(key)
        contents = contents[key]
    tensors = {str(k): v for k, v in contents.items() if isinstance(v, Tensor) and k not in _COUNTERS}
    if not tensors:
        keys = ", ".join(map(str, list(contents)[:8])) or "nothing"
        raise RunError(f"{source} holds no weights; at its top level: {keys}")
    if lightning and any(k.startswith("model.") for k in tensors):
        tensors = {k: v for k, v in tensors.items() if k.startswith("model.")}
    while prefix := _shared_prefix(tensors):
        wrappers.append(prefix)
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return tensors, tuple(wrappers)


def canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """RepLKNet weights of any layout under the release's names; other networks' are returned as they are."""
    renamed: dict[str, Tensor] = {}
    is_mm = "head.fc.weight" in tensors and any(k.startswith("backbone.stem.") for k in tensors)
    for name, value in tensors.items():
        renamed[_canonical_name(name, is_mm, tensors)] = value
    return renamed if any(k.startswith("stem.0.conv.") for k in renamed) else dict(tensors)


def fit_names(tensors: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Rename `tensors` for `model`, by whichever known layout shares most names with it.

    Returns:
        The renamed tensors, and the layouts that were translated.
    """
    own = model.state_dict().keys()
    release = canonical(tensors)
    flat = {_flattened(k): v for k, v in release.items()}
    candidates: list[tuple[str, dict[str, Tensor]]] = [("", tensors), ("layout", release), ("feature list", flat)]
    for prefix in _PREFIXES:
        candidates.append((f"into {prefix}", {prefix + k: v for k, v in release.items()}))
        candidates.append((f"without {prefix}", {k.removeprefix(prefix): v for k, v in tensors.items()}))
    label, best = max(candidates, key=lambda c: _overlap(c[1], own))
    if best.keys() == tensors.keys():
        return tensors, ()
    return best, (label,)


def _overlap(tensors: Mapping[str, Tensor], own: Any) -> int:
    """How many names of `tensors` the model has."""
    return sum(name in own for name in tensors)


def _wrapper(contents: Mapping, use_ema: bool) -> str | None:
    order = (*_EMA, *_PLAIN) if use_ema else (*_PLAIN, *_EMA)
    for key in order:
        inner = contents.get(key)
        if isinstance(inner, Mapping) and (
            any(isinstance(v, Tensor) for v in inner.values()) or _wrapper(inner, use_ema)
        ):
            return key
    return None


def _shared_prefix(tensors: Mapping[str, Tensor]) -> str | None:
    """A prefix that wrapping, not the network, gave to every name."""
    for prefix in ("module.", "_orig_mod.", "model."):
        if all(k.startswith(prefix) for k in tensors):
            return prefix
    return None


def _canonical_name(name: str, is_mm: bool, tensors: Mapping[str, Tensor]) -> str:
    for prefix in _PREFIXES:
        if re.match(rf"{re.escape(prefix)}(stem|stages|transitions|norm|head)[._]", name):
            name = name.removeprefix(prefix)
    name = _FLAT.sub(r"\1.\2.", name)
    if is_mm:
        name = name.replace("head.fc.", "head.", 1) if name.startswith("head.fc.") else name
        last = max(int(m[1]) for k in tensors if (m := re.match(r"backbone\.stages\.(\d+)\.", k)))
        name = name.replace(f"stages.{last}.norm.", "norm.", 1)
    return name.replace("head.cls_22k.", "head.", 1) if name.startswith("head.cls_22k.") else name


def _flattened(name: str) -> str:
    return re.sub(r"^(stages|transitions)\.(\d+)\.", r"\1_\2.", name)
