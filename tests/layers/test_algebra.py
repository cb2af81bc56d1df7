"""The algebra against the modules that it replaces, in float64."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from replknet.layers.algebra import (
    dilate_kernel,
    fold_after,
    fold_before,
    norm_affine,
    pad_kernel,
    replaced,
    why_norm_cannot_fold,
)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(5, eps=1e-3),
        nn.SyncBatchNorm(5),
        nn.BatchNorm2d(5, affine=False),
        FrozenBatchNorm2d(5),
        FrozenBatchNormAct2d(5, apply_act=False),
        BatchNormAct2d(5, apply_act=False),
    ],
    ids=lambda norm: type(norm).__name__ + ("" if getattr(norm, "affine", True) else "-plain"),
)
def test_norm_affine_is_the_norm(norm, trained):
    norm = trained(norm).double()
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scale, shift = norm_affine(norm)
    assert scale.dtype == torch.float64
    torch.testing.assert_close(scale.view(1, -1, 1, 1) * x + shift.view(1, -1, 1, 1), norm(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (nn.GroupNorm(1, 4), "GroupNorm has no running statistics"),
        (nn.BatchNorm2d(4, track_running_stats=False), "no running statistics"),
        (BatchNormAct2d(4), "includes an activation"),
        (FrozenBatchNormAct2d(4), "includes an activation"),
    ],
    ids=["group", "no-statistics", "activation", "frozen-activation"],
)
def test_norms_that_are_no_affine_map_are_refused(norm, reason):
    assert reason in (why_norm_cannot_fold(norm) or "")
    with pytest.raises(ValueError, match=reason):
        norm_affine(norm)


@pytest.mark.parametrize("has_bias", [True, False])
def test_fold_before_and_after_a_pointwise_convolution(has_bias):
    g = torch.Generator().manual_seed(2)
    rand = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g)  # noqa: E731
    x, weight, bias = rand(2, 6, 5, 4), rand(3, 6, 1, 1), rand(3) if has_bias else None
    before, after = (rand(6), rand(6)), (rand(3), rand(3))
    affine = lambda t, s: t * s[0].view(1, -1, 1, 1) + s[1].view(1, -1, 1, 1)  # noqa: E731
    want = affine(F.conv2d(affine(x, before), weight, bias), after)
    folded = fold_before(*fold_after(weight, bias, *after), *before)
    torch.testing.assert_close(F.conv2d(x, *folded), want, rtol=1e-12, atol=1e-12)


def test_fold_before_refuses_a_padded_kernel():
    with pytest.raises(ValueError, match="only if that is 1x1"):
        fold_before(torch.zeros(2, 2, 3, 3), None, torch.ones(2), torch.zeros(2))


@pytest.mark.parametrize(("size", "dilation"), [((3,), (2,)), ((3, 5), (3, 1)), ((3, 3, 3), (1, 2, 2))])
def test_dilated_and_padded_kernel_computes_the_same(size, dilation):
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(size)]
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, *[9] * len(size), dtype=torch.float64, generator=g)
    kernel = torch.randn(4, 1, *size, dtype=torch.float64, generator=g)
    reach = [d * (k - 1) // 2 for k, d in zip(size, dilation, strict=True)]
    want = conv(x, kernel, padding=reach, dilation=dilation, groups=4)
    dense = pad_kernel(dilate_kernel(kernel, dilation), [2 * r + 5 for r in reach])
    got = conv(x, dense, padding=[r + 2 for r in reach], groups=4)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_replaced_keeps_what_the_parameter_was():
    old = nn.Parameter(torch.zeros(4, 3, 2, 2, dtype=torch.bfloat16).to(memory_format=torch.channels_last))
    old.requires_grad_(False)
    new = replaced(old, torch.full((4, 3, 2, 2), 1 / 3, dtype=torch.float64))
    assert (new.dtype, new.requires_grad, new.stride()) == (old.dtype, False, old.stride())
    assert torch.equal(new, torch.full((4, 3, 2, 2), 1 / 3, dtype=torch.float64).bfloat16())
