"""timm's list of feature maps, for a network whose transitions stand between its stages."""

from collections.abc import Sequence
from typing import Any

from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureListNet
from torch import Tensor, nn


class _Features(FeatureDictNet):
    """Keeps stem, stages and transitions up to the last feature map wanted, in the order in which they run.

    Differs from timm's own wrapper in three points: the order (timm takes that of registration), the norm of a stage
    is applied to the map that is handed out and not to what flows on, and checkpointing is that of the stages.
    """

    def __init__(self, model: nn.Module, out_indices: int | Sequence[int] = (0, 1, 2, 3), **kwargs: Any):
        taken = model.prune_intermediate_layers(out_indices, prune_norm=True)  # type: ignore[operator]
        super().__init__(_InOrder(model), out_indices=tuple(taken), **kwargs)

    def _collect(self, x: Tensor) -> dict[str, Tensor]:
        maps = {}
        for name, module in self.items():
            x = module(x)
            if name in self.return_layers:
                maps[self.return_layers[name]] = module.norm(x)  # type: ignore[operator]
        return maps

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of stem and blocks in backward."""
        for module in self.modules():
            if module is not self and hasattr(module, "grad_checkpointing"):
                setattr(module, "grad_checkpointing", enable)  # noqa: B010 - for the type checker not a submodule


class FeatureDict(_Features):
    """Feature maps by index."""


class FeatureList(_Features, FeatureListNet):
    """Feature maps as a list, highest resolution first."""


class FeatureGetter(FeatureGetterNet):
    """timm's wrapper around `forward_intermediates`, with the checkpointing switch that timm's lacks."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of stem and blocks in backward."""
        self.model.set_grad_checkpointing(enable)  # type: ignore[operator]


class _InOrder(nn.Module):
    """The parts of a RepLKNet as direct children in the order in which they run."""

    def __init__(self, model: nn.Module):
        super().__init__()
        stages = list(model.stages)  # type: ignore[arg-type]
        self.stem = model.stem
        for index, stage in enumerate(stages):
            self.add_module(f"stages_{index}", stage)
            if index + 1 < len(stages):
                self.add_module(f"transitions_{index}", model.transitions[index])  # type: ignore[index]
        self.feature_info = [{**info, "module": f"stages_{i}"} for i, info in enumerate(model.feature_info)]  # type: ignore[arg-type]
