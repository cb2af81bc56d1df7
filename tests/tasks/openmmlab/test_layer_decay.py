"""The optimizer constructor has the release's 14 groups."""

import re

import pytest
import torch
from torch import nn

from replknet._errors import UsageError
from replknet.tasks.openmmlab import require

require("segmentation")
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import MODELS  # noqa: E402

import replknet.tasks.openmmlab.layer_decay  # noqa: E402, F401


class Wrapped(nn.Module):
    """A backbone, and a head beside it whose names look like the backbone's."""

    def __init__(self, model: str):
        super().__init__()
        with torch.device("meta"):
            self.backbone = MODELS.build({"type": "RepLKNet", "model": model, "norm_features": [3]})
            self.decode_head = nn.ModuleDict({"stem": nn.ModuleDict({"0": nn.Conv2d(3, 4, 1)})})


def wrapper(model: nn.Module, **paramwise):
    optimizer = {"type": "SGD", "lr": 1.0, "weight_decay": 0.05}
    return build_optim_wrapper(
        model, {"optimizer": optimizer, "constructor": "RepLKNetLayerDecay", "paramwise_cfg": paramwise}
    )


def release_group(name: str) -> int:
    """The rule as the release words it."""
    name = name.removeprefix("backbone.")
    if name.startswith("stem"):
        return 0
    if match := re.match(r"stages\.(\d)\.blocks\.(\d+)\.", name):
        stage, block = int(match[1]), int(match[2])
        return {0: 1, 1: 2, 2: 3 + block // 4, 3: 12}[stage]
    if match := re.match(r"transitions\.(\d)", name):
        return {0: 1, 1: 2, 2: 11}[int(match[1])]
    return 12 if name.startswith("stages.3.norm") else 13


def test_the_releases_groups():
    model = Wrapped("replknet_31b")
    groups = [g for g in wrapper(model, decay_rate=0.7).optimizer.param_groups if g["params"]]
    found = {id(p): g for g in groups for p in g["params"]}
    names = dict(model.named_parameters())
    assert len(found) == sum(len(g["params"]) for g in groups) == len(names)
    for name, parameter in names.items():
        group = found[id(parameter)]
        expected = 13 if name.startswith("decode_head") else release_group(name)
        assert group["lr"] == pytest.approx(0.7 ** (13 - expected)), name
        assert group["weight_decay"] == (0.0 if parameter.ndim == 1 else 0.05), name
    assert len({round(g["lr"], 12) for g in groups}) == 14


def test_frozen_parameters_are_left_out():
    model = Wrapped("replknet_nano")
    model.backbone.requires_grad_(False)
    groups = wrapper(model, decay_rate=0.7).optimizer.param_groups
    assert sum(p.numel() for g in groups for p in g["params"]) == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "needs decay_rate"), ({"decay_rate": 1.5}, "needs decay_rate"), ({"decay_rate": 0.7, "a": 1}, "got a too")],
)
def test_wrong_options(options, message):
    with pytest.raises(UsageError, match=message):
        wrapper(Wrapped("replknet_nano"), **options)


def test_a_model_without_our_backbone():
    with pytest.raises(UsageError, match="one RepLKNet inside; 0 found"):
        wrapper(nn.Linear(2, 2), decay_rate=0.7)
