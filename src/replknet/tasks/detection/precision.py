"""Box coordinates in float32 where the network runs in 16 bits.

Under autocast mmdet casts anchors, points and regions to the dtype of the feature maps: in bfloat16 a coordinate near
1000 pixels is rounded to the next multiple of 4. Convolutions and linear layers stay in 16 bits here; what they hand to
the geometry is cast first.
"""

from typing import Any

import torch
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors.base_roi_extractor import BaseRoIExtractor
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor, nn


def keep_boxes_in_float32(model: nn.Module) -> nn.Module:
    """Cast outputs of heads and inputs of region extractors to float32; without autocast this changes nothing.

    Args:
        model: a detector; gets hooks, once.

    Returns:
        `model` itself.
    """
    for module in model.modules():
        if getattr(module, "_boxes_in_float32", False):
            continue
        if isinstance(module, (BaseDenseHead, BBoxHead, FCNMaskHead)):
            module.register_forward_hook(lambda _module, _inputs, output: _float32(output))
        elif isinstance(module, BaseRoIExtractor):
            module.register_forward_pre_hook(
                lambda _module, args, kwargs: (_float32(args), _float32(kwargs)), with_kwargs=True
            )
        else:
            continue
        module._boxes_in_float32 = True  # type: ignore[assignment]
    return model


@HOOKS.register_module()
class Float32Boxes(Hook):
    """`keep_boxes_in_float32` for the model of a Runner."""

    def before_run(self, runner: Any) -> None:
        """Prepare the model before training or testing."""
        keep_boxes_in_float32(runner.model)


def _float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if isinstance(value, dict):
        return {key: _float32(inner) for key, inner in value.items()}
    return type(value)(_float32(inner) for inner in value) if isinstance(value, (list, tuple)) else value
