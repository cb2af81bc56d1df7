"""Layer-wise decay of the learning rate as an optimizer constructor of OpenMMLab's configs.

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-4, weight_decay=0.05),
    constructor='RepLKNetLayerDecay',
    paramwise_cfg=dict(decay_rate=0.7))
"""

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from replknet._errors import UsageError
from replknet.models._layer_groups import layer_group, num_layer_groups
from replknet.models.replknet import RepLKNet


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class RepLKNetLayerDecay(DefaultOptimWrapperConstructor):
    """Learning rate `lr * decay_rate ** (13 - group)` with the release's 14 groups for layers 2-2-18-2.

    Heads and necks are in the last group. Biases and 1-D parameters have no weight decay. Groups for other depths
    follow `replknet.models._layer_groups`. `paramwise_cfg` takes `decay_rate` alone.
    """

    def _validate_cfg(self) -> None:
        # Here and not in add_params alone, which the base class does not call where paramwise_cfg is empty.
        self._decay_rate()

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **kwargs: Any) -> None:
        """Append the groups of `module`, which holds one RepLKNet.

        Raises:
            UsageError: a decay rate outside (0, 1], further options, or no RepLKNet inside.
        """
        rate = self._decay_rate()
        prefix, layers = _backbone(module)
        last = num_layer_groups(layers) - 1
        groups: dict[str, dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            group = layer_group(name.removeprefix(prefix), layers) if name.startswith(prefix) else last
            decays = parameter.ndim > 1 and not name.endswith(".bias")
            scale = float(rate ** (last - group))
            key = f"layer_{group}_{'decay' if decays else 'no_decay'}"
            made = {
                "params": [],
                "lr": self.base_lr * scale,
                "weight_decay": float(self.base_wd or 0.0) if decays else 0.0,
                "lr_scale": scale,
                "group_name": key,
            }
            groups.setdefault(key, made)["params"].append(parameter)
        params.extend(groups.values())

    def _decay_rate(self) -> float:
        options = dict(self.paramwise_cfg)
        rate = options.pop("decay_rate", None)
        if rate is None or not 0 < rate <= 1:
            raise UsageError(f"paramwise_cfg: RepLKNetLayerDecay needs decay_rate in (0, 1]; got {rate}")
        if options:
            raise UsageError(f"paramwise_cfg: RepLKNetLayerDecay knows decay_rate alone; got {', '.join(options)} too")
        if not self.base_lr:
            raise UsageError("RepLKNetLayerDecay needs the optimizer's lr")
        return float(rate)


def _backbone(module: nn.Module) -> tuple[str, tuple[int, ...]]:
    found = [(name, part) for name, part in module.named_modules() if isinstance(part, RepLKNet)]
    if len(found) != 1:
        raise UsageError(f"RepLKNetLayerDecay needs a model with one RepLKNet inside; {len(found)} found")
    name, network = found[0]
    return (f"{name}." if name else "", network.layers)
