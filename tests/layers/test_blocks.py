"""The two blocks against their formulas, and folded."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from replknet.layers import ConvFFN, RepLKBlock


def _norm(x, bn):
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)


def _unit(x, unit):
    conv = unit.conv
    return _norm(F.conv2d(x, conv.weight, padding=conv.padding, groups=conv.groups), unit.bn)


def test_replk_block_is_its_formula(trained):
    torch.manual_seed(0)
    block = trained(RepLKBlock(4, 9, 3, dw_channels=6)).double()
    x = torch.randn(2, 4, 7, 5, dtype=torch.float64)
    y = _unit(_norm(x, block.prelkb_bn), block.pw1).relu()
    y = (_unit(y, block.large_kernel.lkb_origin) + _unit(y, block.large_kernel.small_conv)).relu()
    torch.testing.assert_close(block(x), x + _unit(y, block.pw2))


def test_conv_ffn_is_its_formula(trained):
    torch.manual_seed(0)
    block = trained(ConvFFN(4, 10)).double()
    x = torch.randn(2, 4, 7, 5, dtype=torch.float64)
    y = F.gelu(_unit(_norm(x, block.preffn_bn), block.pw1))
    torch.testing.assert_close(block(x), x + _unit(y, block.pw2))


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, nn.SyncBatchNorm])
@pytest.mark.parametrize("make", [lambda n: RepLKBlock(4, 9, 3, norm_layer=n), lambda n: ConvFFN(4, 12, norm_layer=n)])
def test_fuse_leaves_no_norm_and_the_same_answers(make, norm_layer, trained):
    torch.manual_seed(0)
    block = trained(make(norm_layer)).double()
    x = torch.randn(2, 4, 7, 5, dtype=torch.float64)
    want = block(x)
    assert block.fuse() is block
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm)) for m in block.modules())
    torch.testing.assert_close(block(x), want, rtol=1e-11, atol=1e-11)
    state = {k: v.clone() for k, v in block.state_dict().items()}
    block.fuse()
    assert all(torch.equal(v, state[k]) for k, v in block.state_dict().items())


def test_drop_path_leaves_out_whole_samples():
    torch.manual_seed(0)
    block = ConvFFN(4, 8, drop_path=0.5)
    x = torch.randn(64, 4, 3, 3)
    untouched = (block(x) == x).flatten(1).all(1)
    assert 16 < untouched.sum() < 48
