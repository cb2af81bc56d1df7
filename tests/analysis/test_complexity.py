"""Counts against the published table, closed formulas and independent figures."""

import pytest
import timm
import torch
from torch import nn

import replknet
from replknet.analysis.complexity import complexity


@pytest.mark.parametrize(
    ("name", "size", "params", "macs"),
    [
        # Ding et al. 2022, table 5 and the release's README: 79M 15.3G / 45.1G, 172M 96.0G, 335M 128.7G.
        ("replknet_31b", 224, 79, 15.3),
        ("replknet_31b", 384, 79, 45.1),
        ("replknet_31l", 384, 172, 96.0),
        ("replknet_xl", 320, 335, 128.7),
    ],
)
def test_published_table(name, size, params, macs):
    cost = complexity(timm.create_model(name, form="merged", device="meta"), (3, size, size))
    assert cost.params // 10**6 == params
    # The paper cuts 15.353 to 15.3 and rounds 95.989 to 96.0: within its last digit either way.
    assert cost.macs / 1e9 == pytest.approx(macs, abs=0.06)


@pytest.mark.parametrize(
    ("form", "size", "macs"), [("train", 224, 15.43), ("train", 384, 45.35), ("merged", 224, 15.35)]
)
def test_forms_differ_by_the_small_kernels(form, size, macs):
    cost = complexity(timm.create_model("replknet_31b", form=form, device="meta"), (3, size, size))
    assert round(cost.macs / 1e9, 2) == macs


@pytest.mark.parametrize(
    ("name", "size", "params", "macs"),
    [("replknet_nano", 32, 0.85, 0.0107), ("replknet_tiny", 224, 7.15, 1.55), ("replknet_small", 224, 21.12, 4.25)],
)
def test_figures_in_our_docstrings(name, size, params, macs):
    cost = complexity(timm.create_model(name, form="merged", device="meta"), (3, size, size))
    assert cost.params / 1e6 == pytest.approx(params, abs=0.005)
    assert cost.macs / 1e9 == pytest.approx(macs, rel=5e-3)


@pytest.mark.parametrize(("name", "macs"), [("resnet50", 4.09), ("vit_tiny_patch16_224", 1.07)])
def test_other_networks(name, macs):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert complexity(model).macs / 1e9 == pytest.approx(macs, abs=0.02)


@pytest.mark.parametrize(
    ("layer", "macs", "outputs"),
    [
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), 6 * 8 * 8 * 2 * 9, 6 * 64),
        (nn.Conv2d(4, 6, 3, stride=2), 6 * 3 * 3 * 4 * 9, 6 * 9),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), 4 * 64 * 6 * 4, 6 * 256),
        (nn.Sequential(nn.Flatten(), nn.Linear(256, 10)), 2560, 10),
    ],
)
def test_layers_by_hand(layer, macs, outputs):
    cost = complexity(layer, (4, 8, 8))
    assert (cost.macs, cost.activations) == (macs, outputs)


def test_parts_sum_to_the_whole_and_have_shapes():
    cost = complexity(timm.create_model("replknet_nano", device="meta"), (3, 48, 32))
    assert sum(part.macs for part in cost.parts) == cost.macs
    assert sum(part.params for part in cost.parts) == cost.params
    assert sum(part.activations for part in cost.parts) == cost.activations
    shapes = {part.name: part.output_shape for part in cost.parts}
    assert shapes["stages.1"] == (48, 12, 8)
    assert shapes["head"] == (1000,)


def test_model_is_left_as_it_was():
    model = timm.create_model("replknet_nano").train()
    model.stages[0].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    complexity(model, (3, 32, 32))
    assert model.training
    assert not model.stages[0].training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_networks_that_need_data_run_once_in_place():
    class Threshold(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.conv(x) if x.sum().item() == 0 else x

    model = Threshold()
    assert complexity(model, (3, 4, 4)).macs == 2 * 3 * 16
    assert model.training
    assert not model.conv._forward_hooks


@pytest.mark.parametrize("size", [(3, 224), (3, 0, 224)])
def test_wrong_sizes(size):
    with pytest.raises(ValueError, match=r"\(channels, height, width\)"):
        complexity(nn.Conv2d(3, 3, 1), size)


def test_wrong_channels_say_what_was_given():
    with pytest.raises(ValueError, match="RepLKNet does not take images of"):
        complexity(timm.create_model("replknet_nano"), (5, 32, 32))


def test_fusing_costs_nothing_more():
    model = timm.create_model("replknet_nano").eval()
    merged = complexity(replknet.reparameterize(model, fold_norms=False), (3, 32, 32)).macs
    assert complexity(replknet.reparameterize(model), (3, 32, 32)).macs == merged


def test_parts_of_a_wrapped_network_are_its_own():
    class Wrapper(nn.Module):
        def __init__(self, network: nn.Module):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x)

    network = timm.create_model("replknet_nano")
    inner, outer = complexity(network, (3, 64, 64)), complexity(Wrapper(network), (3, 64, 64))
    assert [part.name for part in outer.parts] == [f"network.{part.name}" for part in inner.parts]
    assert sum(part.macs for part in outer.parts) == inner.macs
    assert [part.name for part in complexity(nn.Sequential(nn.Conv2d(3, 4, 1)), (3, 8, 8)).parts] == ["0"]
