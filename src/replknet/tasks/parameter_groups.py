"""Which parameter gets which weight decay and which share of the learning rate."""

from typing import Any

from timm.models import group_parameters
from timm.optim._param_groups import auto_group_layers
from torch import nn

from replknet._errors import UsageError


def parameter_groups(model: nn.Module, *, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Groups for an optimizer: no decay on 1-D parameters and biases, learning-rate scale by depth.

    Parameters that do not require a gradient are left out. With `layer_decay` d < 1 and layers numbered 0 (stem) to L
    (head) by the model's `group_matcher`, a parameter of layer i has `lr_scale` = d ** (L - i); RepLKNets have L = 13.

    Args:
        model: a timm model, or any module that holds one.
        weight_decay: for the groups that decay.
        layer_decay: d, in (0, 1]; 1 gives every group `lr_scale` 1.

    Returns:
        Dicts with `params`, `weight_decay`, `lr_scale` (plain floats), `decays` (bool) and `name`
        ("decay", "layer_3_no_decay", ...), in the order in which the model's parameters first need them.

    Raises:
        UsageError: layer_decay out of range, or for a model without layer numbers, or nothing left to train.

    Source: `get_parameter_groups` in the official release's optim_factory.py; BEiT, arXiv:2106.08254.
    """
    if not 0 < layer_decay <= 1:
        raise UsageError(f"layer_decay must be in (0, 1], got {layer_decay}")
    layers = layer_ids(model) if layer_decay < 1 else {}
    last = max(layers.values(), default=0)
    if layer_decay < 1 and last == 0:
        raise UsageError(f"{type(model).__name__} does not tell its layers (no group_matcher): set layer_decay to 1")
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and not name.endswith(".bias")
        layer = layers.get(name, last)
        key = (f"layer_{layer}_" if layers else "") + ("decay" if decays else "no_decay")
        group = groups.setdefault(
            key,
            {
                "params": [],
                "weight_decay": float(weight_decay) if decays else 0.0,
                "lr_scale": float(layer_decay ** (last - layer)),
                "decays": decays,
                "name": key,
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise UsageError("no parameter is left to train; every stage is frozen: freeze fewer")
    return list(groups.values())


def layer_ids(model: nn.Module) -> dict[str, int]:
    """Layer number of each parameter, 0 for the stem and the largest for the head.

    In a wrapper the outermost module with a `group_matcher` counts; what lies outside it has no number.
    """
    owners = [(name, module) for name, module in model.named_modules() if hasattr(module, "group_matcher")]
    if not owners:
        return auto_group_layers(model)
    prefix, owner = owners[0]
    matcher = owner.group_matcher(coarse=False)  # type: ignore[operator]
    # With reverse=True timm returns name to layer, whatever its annotation says.
    layers: Any = group_parameters(owner, matcher, reverse=True)
    return {f"{prefix}.{name}" if prefix else name: layer for name, layer in layers.items()}
