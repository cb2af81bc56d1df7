"""A segmentor as the published tables count it: whole input to logits, without the auxiliary head."""

import torch
from mmengine.config import Config
from torch import nn

from replknet.tasks.segmentation.segmentor import build_segmentor, prepare_for_inference


def counted_segmentor(config: Config, *, merged: bool = True) -> nn.Module:
    """The config's segmentor without data on the meta device, in evaluation mode.

    Args:
        config: with `model`.
        merged: the backbone re-parameterised, its norms folded too: the form that the published table counts.

    Returns:
        Maps `[N, 3, H, W]` to logits `[N, classes, H / 4, W / 4]`.
    """
    with torch.device("meta"):
        return prepare_for_inference(build_segmentor(config), merged=merged)
