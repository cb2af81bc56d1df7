"""RepLKNet as a backbone in OpenMMLab's registry: the timm model's own code and state-dict names.

backbone=dict(type='RepLKNet', model='replknet_31b', drop_path_rate=0.3, norm_cfg=dict(type='SyncBN'),
              init_cfg=dict(type='Pretrained', checkpoint='replknet_31b.in22k'))
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmcv.cnn import build_norm_layer
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn

from replknet._errors import RunError, UsageError
from replknet.models.checkpoints import LoadReport, load_checkpoint, read_state_dict
from replknet.models.family import ARCHITECTURES
from replknet.models.replknet import RepLKNet
from replknet.tasks.openmmlab.checkpoint_files import weights_file

_BACKBONE = re.compile(r"(stem|stages|transitions)\.")
_RENAMED = {
    "large_kernel_sizes": "kernel_sizes",
    "use_checkpoint": "grad_checkpointing",
    "norm_intermediate_features": "norm_features",
    "small_kernel_merged": "form",
    "use_sync_bn": "norm_cfg",
}
"""Arguments of the release's backbone and what they are called here."""


@MODELS.register_module(name="RepLKNet")
class RepLKNetBackbone(RepLKNet):
    """RepLKNet that hands out feature maps of its stages.

    Args:
        model: named architecture whose arguments are the defaults; None for RepLKNet-31B's.
        out_indices: stages whose maps are handed out; what comes after the last is not built.
        norm_cfg: mmcv's description of the norms, `dict(type='SyncBN')` for example; None for plain batch norm.
        frozen_stages: -1 for none, 0 for the stem, k for the stem and the first k stages with all between them: kept in
            evaluation mode and without gradients. The norms of handed-out maps (`norm_features`) stay free.
        norm_eval: keep all batch norms in evaluation mode, with gradients.
        init_cfg: `dict(type='Pretrained', checkpoint=...)` with the name of official weights
            (`replknet_31b.in1k_384`) or a checkpoint file of any kind, a classifier's, a segmentor's or a detector's;
            loaded strictly but for heads and the norms of handed-out maps.
        pretrained: short for such an `init_cfg`.
        arguments: of `RepLKNet`: kernel_sizes, layers, channels, small_kernel, dw_ratio, ffn_ratio, in_chans,
            drop_path_rate, norm_features (True, or the stages), grad_checkpointing, stem_stride, form.

    Raises:
        UsageError: an unknown architecture or argument, or both `init_cfg` and `pretrained`.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        norm_cfg: Mapping[str, Any] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        init_cfg: Mapping[str, Any] | None = None,
        pretrained: str | None = None,
        **arguments: Any,
    ):
        defaults = _architecture(model)
        _check(arguments, init_cfg, pretrained)
        super().__init__(
            **{**defaults, **arguments}, num_classes=0, norm_layer=_norm_layer(norm_cfg) if norm_cfg else nn.BatchNorm2d
        )
        if not -1 <= frozen_stages <= len(self.stages):
            raise UsageError(f"frozen_stages={frozen_stages}: give -1 for none to {len(self.stages)} for all")
        self.out_indices = self.prune_intermediate_layers(out_indices, prune_norm=True)
        self.out_channels = [self.feature_info[index]["num_chs"] for index in self.out_indices]
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        self.init_cfg = {"type": "Pretrained", "checkpoint": pretrained} if pretrained else init_cfg
        self.is_init = False
        self.train(self.training)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """`[N, in_chans, H, W]` to maps `[N, C_s, H_s, W_s]` of the stages asked for, highest resolution first."""
        maps = self.forward_intermediates(x, list(self.out_indices), intermediates_only=True)
        return tuple(maps)  # type: ignore[arg-type]

    def init_weights(self) -> None:
        """Load the weights that `init_cfg` names; without one the constructor's values stay."""
        self.is_init = True
        if not self.init_cfg:
            return
        report = load_backbone(self, self.init_cfg["checkpoint"])
        print_log(f"backbone: {report}", logger="current", level=logging.INFO)

    def train(self, mode: bool = True) -> "RepLKNetBackbone":
        """As `nn.Module.train`, but what is frozen stays so."""
        super().train(mode)
        if not hasattr(self, "frozen_stages"):  # during RepLKNet's own constructor
            return self
        for module in self._frozen():
            module.eval().requires_grad_(False)
        if self.norm_eval:
            for module in self.modules():
                if hasattr(module, "running_mean"):
                    module.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        stages: Any = self.stages[: self.frozen_stages]
        return [self.stem, *(stage.blocks for stage in stages), *self.transitions[: max(len(stages) - 1, 0)]]


def load_backbone(backbone: RepLKNetBackbone, checkpoint: str | Path) -> LoadReport:
    """Load the backbone's part of a checkpoint, strictly but for norms of handed-out maps that the file lacks.

    Args:
        backbone: changed in place.
        checkpoint: name of official weights, or a file of any layout.

    Raises:
        UsageError: neither such a name nor a file.
        RunError: damaged, or another network's weights.
    """
    tensors = read_state_dict(weights_file(checkpoint))
    state = {name: tensor for name, tensor in tensors.items() if _BACKBONE.match(name)}
    if not state:
        raise RunError(f"{checkpoint} holds no RepLKNet backbone; its first keys: {', '.join(list(tensors)[:4])}")
    stages = len(backbone.stages)
    spare = [f"stages.{index}" for index in range(stages, 8)] + [f"transitions.{i}" for i in range(stages - 1, 8)]
    report = load_checkpoint(backbone, state, may_differ=[*(f"stages.{i}.norm" for i in range(8)), *spare])
    return LoadReport(**{**vars(report), "source": str(checkpoint)})


def _architecture(model: str | None) -> dict[str, Any]:
    if model is None:
        return {}
    if model not in ARCHITECTURES:
        raise UsageError(f"unknown architecture model={model!r}; known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model]


def _check(arguments: Mapping[str, Any], init_cfg: Mapping[str, Any] | None, pretrained: str | None) -> None:
    for old, new in _RENAMED.items():
        if old in arguments:
            raise UsageError(f"the backbone's argument {old} of the first release is called {new} here")
    if "num_classes" in arguments or "norm_layer" in arguments:
        raise UsageError("a backbone has no num_classes; its norms are chosen with norm_cfg")
    if init_cfg and pretrained:
        raise UsageError("give either init_cfg or pretrained, not both")
    if init_cfg and (not isinstance(init_cfg, Mapping) or init_cfg.get("type") != "Pretrained"):
        raise UsageError(f"init_cfg={init_cfg}: the backbone knows dict(type='Pretrained', checkpoint=...) only")
    if init_cfg and not init_cfg.get("checkpoint"):
        raise UsageError("init_cfg of type Pretrained needs checkpoint=, official weights' name or a file")


def _norm_layer(norm_cfg: Mapping[str, Any]) -> Any:
    def make(channels: int) -> nn.Module:
        return build_norm_layer(dict(norm_cfg), channels)[1]

    return make
