"""The algebra of re-parameterisation: tensors in, tensors out, in float64.

A batch norm that has stopped learning is an affine map per channel, a convolution is linear, so neighbours melt into
one convolution, and parallel convolutions of one input melt into one kernel. Everything here is exact up to one
rounding: callers cast back to the parameter's dtype once, at the end.

Source: Ding et al. 2021 (RepVGG, arXiv:2101.03697), sec. 3.3; Ding et al. 2022 (arXiv:2203.06717), sec. 3;
Ding et al. 2024 (UniRepLKNet, arXiv:2311.15599), sec. 3 for dilated branches.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def why_norm_cannot_fold(norm: nn.Module) -> str | None:
    """The reason why `norm` is not a fixed affine map per channel, or None if it is one.

    Anything with running statistics qualifies, whatever its class: BatchNorm, SyncBatchNorm, the FrozenBatchNorm2d of
    torchvision, timm or detectron2. `nn.Identity` qualifies too.
    """
    name = type(norm).__name__
    if isinstance(norm, nn.Identity):
        return None
    mean, var = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        return f"{name} has no running statistics, its output depends on the input's own"
    if not isinstance(getattr(norm, "act", nn.Identity()), nn.Identity):
        return f"{name} includes an activation"
    return None


def norm_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """`(scale, shift)` with `norm(x) == scale * x + shift` in evaluation.

    Returns:
        Two float64 tensors `[C]` on the norm's device (on the CPU for devices without float64).

    Raises:
        ValueError: `norm` is not a fixed affine map; the message says why.
    """
    if reason := why_norm_cannot_fold(norm):
        raise ValueError(f"cannot fold this norm: {reason}; accepted: batch norms with running statistics")
    mean, var = to_float64(norm.running_mean), to_float64(norm.running_var)  # type: ignore[arg-type]
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    scale = torch.rsqrt(var + norm.eps)  # type: ignore[operator]
    if weight is not None:
        scale = scale * to_float64(weight)
    shift = -mean * scale
    if bias is not None:
        shift = shift + to_float64(bias)
    return scale, shift


def fold_after(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of `scale * (weight @ x + bias) + shift`; `weight` is `[out, ...]`, the others `[out]`."""
    folded = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return folded, shift if bias is None else shift + scale * bias


def fold_before(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of `weight @ (scale * x + shift) + bias` for dense 1x1 weights `[out, in, 1, ...]`.

    Larger kernels do not qualify: padding puts zeros, not `shift`, around the map.
    """
    if weight.shape[2:].numel() != 1:
        raise ValueError(f"a norm folds into the following convolution only if that is 1x1; got {list(weight.shape)}")
    matrix = weight.flatten(1)
    moved = matrix @ shift
    return (matrix * scale).reshape(weight.shape), moved if bias is None else moved + bias


def dilate_kernel(kernel: Tensor, dilation: Sequence[int]) -> Tensor:
    """The dense kernel `[out, in, d*(k-1)+1, ...]` of a dilated kernel `[out, in, k, ...]`: zeros in between."""
    sizes = [d * (k - 1) + 1 for k, d in zip(kernel.shape[2:], dilation, strict=True)]
    dense = kernel.new_zeros(*kernel.shape[:2], *sizes)
    dense[(..., *(slice(None, None, d) for d in dilation))] = kernel
    return dense


def pad_kernel(kernel: Tensor, size: Sequence[int]) -> Tensor:
    """`kernel` `[out, in, k, ...]` in the middle of zeros of spatial extent `size`; all extents odd, `k <= size`."""
    margins = [(want - have) // 2 for have, want in zip(kernel.shape[2:], size, strict=True)]
    return F.pad(kernel, [margin for m in reversed(margins) for margin in (m, m)])


def to_float64(tensor: Tensor) -> Tensor:
    """A detached float64 copy, on the CPU where the device has no float64."""
    device = "cpu" if tensor.device.type == "mps" else tensor.device
    return tensor.detach().to(device).double()


def replaced(parameter: Tensor, value: Tensor) -> nn.Parameter:
    """`value` as a parameter with dtype, device, requires_grad and (shapes agreeing) memory layout of `parameter`."""
    if value.shape == parameter.shape:
        data = torch.empty_like(parameter, requires_grad=False)
    else:
        data = torch.empty(value.shape, dtype=parameter.dtype, device=parameter.device)
    return nn.Parameter(data.copy_(value), requires_grad=parameter.requires_grad)
