"""From the form that trains to the form that runs, for any model that contains re-parameterisable modules."""

import torch
from torch import nn

from replknet.layers.algebra import why_norm_cannot_fold
from replknet.layers.blocks import ConvFFN, RepLKBlock
from replknet.layers.conv_norm import ConvNorm, refuse_training
from replknet.layers.reparam_large_kernel_conv import ReparamLargeKernelConv

_UNITS = (ConvNorm, ReparamLargeKernelConv, RepLKBlock, ConvFFN)


@torch.no_grad()
def reparameterize(model: nn.Module, *, fold_norms: bool = True) -> nn.Module:
    """Merge small kernels into large ones, then fold every batch norm that can be folded.

    In place. Keeps device, dtype, memory format and requires_grad; a second call changes nothing. Works on RepLKNet,
    on any model that has one inside, and on timm models that follow timm's convention (`fuse`, `reparameterize`,
    `switch_to_deploy`).

    Args:
        model: in evaluation mode.
        fold_norms: False stops after the kernels: the release's deploy form with `lkb_reparam.{weight,bias}`.

    Returns:
        `model` itself.

    Raises:
        ValueError: training mode, or a norm class that is no fixed affine map (GroupNorm, batch norm without running
            statistics); nothing is changed then.

    Example:
        >>> model = replknet.reparameterize(timm.create_model("replknet_nano").eval())
    """
    refuse_training(model)
    _refuse_unfoldable(model, fold_norms)
    if not fold_norms:
        for module in list(model.modules()):
            if isinstance(module, ReparamLargeKernelConv):
                module.fuse()
        return model
    return _fuse(model)


def _fuse(module: nn.Module) -> nn.Module:
    for method in ("fuse", "reparameterize", "switch_to_deploy"):
        if callable(fuse := getattr(module, method, None)):
            result = fuse()
            return result if method == "fuse" and isinstance(result, nn.Module) else module
    for name, child in module.named_children():
        fused = _fuse(child)
        if fused is not child:
            setattr(module, name, fused)
    return module


def _refuse_unfoldable(model: nn.Module, fold_norms: bool) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, _UNITS if fold_norms else ReparamLargeKernelConv):
            continue
        for child_name, child in module.named_modules():
            if not _is_norm(child_name):
                continue
            if reason := why_norm_cannot_fold(child):
                raise ValueError(f"cannot re-parameterise: {name}.{child_name}: {reason}")


def _is_norm(name: str) -> bool:
    return name.rpartition(".")[2] in ("bn", "prelkb_bn", "preffn_bn")
