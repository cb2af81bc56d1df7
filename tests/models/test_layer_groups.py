"""Layer-decay groups against the release's table."""

import pytest
import timm

from replknet.models._layer_groups import layer_group, num_layer_groups

RELEASE = (2, 2, 18, 2)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("stem.0.conv.weight", 0),
        ("stages.0.blocks.3.pw1.bn.weight", 1),
        ("transitions.0.1.conv.weight", 1),
        ("stages.1.blocks.0.large_kernel.lkb_origin.conv.weight", 2),
        ("transitions.1.0.bn.bias", 2),
        ("stages.2.blocks.0.prelkb_bn.weight", 3),
        ("stages.2.blocks.3.pw1.conv.weight", 3),
        ("stages.2.blocks.4.pw1.conv.weight", 4),
        ("stages.2.blocks.35.pw2.bn.bias", 11),
        ("transitions.2.0.conv.weight", 11),
        ("stages.3.blocks.0.pw1.conv.weight", 12),
        ("stages.0.norm.weight", 1),
        ("stages.2.norm.bias", 11),
        ("stages.3.norm.weight", 12),
        ("norm.weight", 13),
        ("head.bias", 13),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "model.", "_orig_mod.module.model."])
def test_group_of_a_name(name, group, prefix):
    assert layer_group(prefix + name, RELEASE) == group


@pytest.mark.parametrize(
    ("name", "group"), [("stages_2.blocks.17.pw1.conv.weight", 7), ("transitions_2.0.bn.bias", 11)]
)
def test_group_in_a_feature_list(name, group):
    assert layer_group(name, RELEASE) == group


def test_number_of_groups():
    assert num_layer_groups(RELEASE) == 14
    assert num_layer_groups((1, 1, 2, 1)) == 6


def test_every_parameter_of_normalised_features_has_a_group():
    model = timm.create_model("replknet_31b", features_only=True, norm_features=True, device="meta")
    groups = {layer_group(name, RELEASE) for name, _ in model.named_parameters()}
    assert groups == set(range(13))


def test_coarse_is_one_group_a_stage():
    model = timm.create_model("replknet_31b", device="meta")
    matcher = model.group_matcher(coarse=True)
    assert {matcher(name) for name, _ in model.named_parameters()} == set(range(6))
