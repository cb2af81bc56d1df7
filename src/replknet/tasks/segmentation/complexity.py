"""A segmentor as the published tables count it: whole input to logits, without the auxiliary head."""

import torch
from mmengine.config import Config
from torch import nn

from replknet.layers import reparameterize
from replknet.tasks.segmentation.segmentor import build_segmentor, prepare_for_inference


def counted_segmentor(config: Config, *, merged: bool = True) -> nn.Module:
    """The config's segmentor without data on the meta device, in evaluation mode.

    Args:
        config: with `model`.
        merged: small kernels merged into the large ones, norms kept: the form that the published FLOPs count.

    Returns:
        Maps `[N, 3, H, W]` to logits `[N, classes, H / 4, W / 4]`.
    """
    with torch.device("meta"):
        model = prepare_for_inference(build_segmentor(config), merged=False)
    return reparameterize(model, fold_norms=False) if merged else model
