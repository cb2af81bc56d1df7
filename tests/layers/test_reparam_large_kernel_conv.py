"""Merging branches into one kernel."""

import copy
import io

import pytest
import torch
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from replknet.layers import Branch, ReparamLargeKernelConv, ReparamLargeKernelConv1d, ReparamLargeKernelConv3d

CASES = {
    "release-31-5": (2, {"kernel_size": 31, "small_kernel": 5}),
    "large-only": (2, {"kernel_size": 27}),
    "equal": (2, {"kernel_size": 5, "small_kernel": 5}),
    "one": (2, {"kernel_size": 1}),
    "rectangular": (2, {"kernel_size": (7, 3), "small_kernel": (3, 1)}),
    "slak": (2, {"kernel_size": (51, 5), "branches": [(5, 51), 5]}),
    "unireplknet-13": (
        2,
        {"kernel_size": 13, "branches": [Branch(5, 1), Branch(7, 2), Branch(3, 3), Branch(3, 4), Branch(3, 5)]},
    ),
    "dilation-beyond-the-kernel": (2, {"kernel_size": 3, "branches": [Branch(3, (5, 1))]}),
    "strided": (2, {"kernel_size": 9, "small_kernel": 3, "branches": [Branch(3, 2)], "stride": 2}),
    "frozen": (2, {"kernel_size": 9, "small_kernel": 3, "norm_layer": FrozenBatchNorm2d}),
    "sync": (2, {"kernel_size": 9, "small_kernel": 3, "norm_layer": nn.SyncBatchNorm}),
    "no-norm": (2, {"kernel_size": 9, "small_kernel": 3, "norm_layer": lambda channels: nn.Identity()}),
    "1d": (1, {"kernel_size": 31, "small_kernel": 5, "branches": [Branch(7, 3)]}),
    "3d": (3, {"kernel_size": 7, "small_kernel": 3, "branches": [Branch(3, (1, 2, 3))]}),
}
CLASSES = {1: ReparamLargeKernelConv1d, 2: ReparamLargeKernelConv, 3: ReparamLargeKernelConv3d}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused_equals_the_branches(case, trained):
    dims, arguments = CASES[case]
    torch.manual_seed(0)
    layer = trained(CLASSES[dims](3, **arguments)).double()
    x = torch.randn(2, 3, *(11, 8, 9)[:dims], dtype=torch.float64)
    want = layer(x)
    fused = layer.fuse()
    assert fused is layer
    assert fused.is_merged
    assert set(fused.state_dict()) == {"lkb_reparam.weight", "lkb_reparam.bias"}
    torch.testing.assert_close(fused(x), want, rtol=1e-11, atol=1e-11)
    weight = fused.lkb_reparam.weight
    fused.fuse()
    assert fused.lkb_reparam.weight is weight
    built = CLASSES[dims](3, **arguments, merged=True).double()
    built.load_state_dict(fused.state_dict())
    assert torch.equal(built(x), fused(x))


def test_state_dict_keys_are_the_release_s():
    layer = ReparamLargeKernelConv(4, 31, 5)
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    want = [f"{b}.{k}" for b in ("lkb_origin", "small_conv") for k in ("conv.weight", *(f"bn.{n}" for n in norm))]
    assert list(layer.state_dict()) == want


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"kernel_size": (3, 4)}, "kernel_size must be odd"),
        ({"kernel_size": 0}, "must be odd and positive"),
        ({"kernel_size": 7, "small_kernel": 2}, "small_kernel must be odd"),
        ({"kernel_size": 7, "small_kernel": 9}, "small_kernel 9 is larger than kernel_size 7"),
        ({"kernel_size": (7, 3), "small_kernel": 5}, "larger than kernel_size"),
        ({"kernel_size": 7, "branches": [Branch(3, 0)]}, "must be positive"),
        ({"kernel_size": 7, "branches": [3, 4]}, r"branches\[1\] must be odd"),
        ({"kernel_size": (3, 3, 3)}, "an integer or 2 integers"),
        ({"kernel_size": 3.0}, "an integer or 2 integers"),
    ],
)
def test_wrong_arguments_say_what_is_accepted(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReparamLargeKernelConv(4, **arguments)


def test_training_mode_is_refused_and_nothing_changes():
    layer = ReparamLargeKernelConv(4, 7, 3)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"in training mode: call \.eval\(\) first"):
        layer.fuse()
    assert layer.state_dict().keys() == before.keys()


def test_keeps_dtype_layout_and_requires_grad(trained):
    layer = trained(ReparamLargeKernelConv(8, 7, 3)).bfloat16().requires_grad_(False)
    fused = layer.fuse().lkb_reparam
    assert fused.weight.dtype == fused.bias.dtype == torch.bfloat16
    assert not fused.weight.requires_grad
    assert not fused.bias.requires_grad
    assert not fused.training


def test_fused_layer_survives_saving_and_copying(trained):
    layer = trained(ReparamLargeKernelConv(4, 7, 3)).fuse()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    x = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    for again in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(again(x), layer(x))
