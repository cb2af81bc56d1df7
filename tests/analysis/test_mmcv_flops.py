"""The rules of MMCV's counter, layer by layer, and that folding leaves the ReLUs in the count."""

import pytest
import timm
import torch
from torch import nn

import replknet
from replknet.analysis.complexity import complexity


@pytest.mark.parametrize(
    ("layer", "flops"),
    [
        (nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), 6 * 64 * 2 * 9),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), 6 * 64 * (2 * 9 + 1)),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), 4 * 64 * 6 * 4 + 6 * 256),
        (nn.Sequential(nn.Flatten(), nn.Linear(256, 10)), 2560),
        (nn.ReLU(), 256),
        (nn.GELU(), 0),
        (nn.AdaptiveAvgPool2d(1), 256),
        (nn.MaxPool2d(2), 256),
        (nn.BatchNorm2d(4), 512),
        (nn.BatchNorm2d(4, affine=False), 256),
        (nn.GroupNorm(2, 4), 512),
        (nn.LayerNorm(8), 512),
        (nn.Upsample(scale_factor=2), 1024),
        (nn.Sequential(nn.Identity(), nn.Dropout()), 0),
    ],
)
def test_layers_by_hand(layer, flops):
    assert complexity(layer, (4, 8, 8)).mmcv_flops == flops


def test_a_layer_called_by_keyword_is_counted():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.conv(input=x)

    cost = complexity(ByKeyword(), (3, 4, 4))
    assert (cost.macs, cost.mmcv_flops) == (96, 96 + 32)


def test_folding_turns_norms_into_biases_and_keeps_the_relus():
    model = timm.create_model("replknet_nano").eval()
    relus: list[int] = []
    pooled: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda _module, _inputs, y: relus.append(y.numel()))
        if isinstance(module, nn.AdaptiveAvgPool2d):
            module.register_forward_hook(lambda _module, inputs, _y: pooled.append(inputs[0].numel()))
    model(torch.zeros(1, 3, 64, 64))
    counted = len(relus), sum(relus), sum(pooled)
    folded = complexity(replknet.reparameterize(model), (3, 64, 64))
    left = sum(isinstance(module, nn.ReLU) for module in model.modules())
    assert 0 < left < counted[0]
    biased = sum(part.activations for part in folded.parts if part.name != "head")
    assert folded.mmcv_flops == folded.macs + biased + counted[1] + counted[2]
