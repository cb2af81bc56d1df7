import re

import pytest
import timm
import torch

import replknet  # noqa: F401 - registers the models
from replknet._errors import UsageError
from replknet.tasks.parameter_groups import parameter_groups


def release_layer(name: str) -> int:
    """The 14 groups as the release's comment lists them, for layers 2-2-18-2."""
    if name.startswith("stem."):
        return 0
    if match := re.match(r"transitions\.(\d)", name):
        return (1, 2, 11)[int(match[1])]
    if match := re.match(r"stages\.(\d)\.blocks\.(\d+)", name):
        stage, block = map(int, match.groups())
        return {0: 1, 1: 2, 2: 3 + block // 4, 3: 12}[stage]
    return 13


def meta(name: str, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def scale_of(model) -> dict[str, float]:
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.5)
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("name", ["replknet_31b", "replknet_31l", "replknet_xl"])
def test_fourteen_groups_of_the_release(name):
    model = meta(name)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.7)
    seen = set()
    for group in groups:
        for parameter in group["params"]:
            key = names[id(parameter)]
            seen.add(key)
            assert group["lr_scale"] == pytest.approx(0.7 ** (13 - release_layer(key)), rel=1e-12), key
            no_decay = parameter.ndim == 1 or key.endswith(".bias")
            assert group["weight_decay"] == (0.0 if no_decay else 0.05), key
            assert group["decays"] is not no_decay
    assert seen == set(names.values())
    assert len({group["lr_scale"] for group in groups}) == 14
    assert len(groups) == 28


def test_every_parameter_once_without_layer_decay():
    model = meta("replknet_31b")
    groups = parameter_groups(model, weight_decay=0.05)
    assert [group["name"] for group in groups] == ["decay", "no_decay"]
    assert all(group["lr_scale"] == 1.0 for group in groups)
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in model.parameters())


def test_normalised_features_join_the_last_group_of_their_stage():
    model = meta("replknet_31b", num_classes=0, norm_features=True)
    scales = scale_of(model)
    layer = {0: 1, 1: 2, 2: 11, 3: 12}
    norms = {key: re.match(r"stages\.(\d)\.norm\.", key) for key in scales}
    assert sum(match is not None for match in norms.values()) >= 6
    for key, match in norms.items():
        expected = layer[int(match[1])] if match else release_layer(key)
        assert scales[key] == 0.5 ** (13 - expected), key


@pytest.mark.parametrize("prefix", ["module", "backbone", "model.backbone"])
def test_prefixes_change_nothing(prefix):
    model = meta("replknet_31b")
    wrapped = model
    for part in reversed(prefix.split(".")):
        wrapped = torch.nn.ModuleDict({part: wrapped})
    assert scale_of(wrapped) == {f"{prefix}.{key}": value for key, value in scale_of(model).items()}


def test_values_are_plain_floats_so_that_checkpoints_load_weights_only():
    for group in parameter_groups(meta("replknet_nano"), weight_decay=0.05, layer_decay=0.7):
        assert type(group["lr_scale"]) is float
        assert type(group["weight_decay"]) is float


def test_frozen_parameters_are_left_out_and_nothing_left_is_an_error():
    model = meta("replknet_nano")
    model.stem.requires_grad_(False)
    kept = {id(p) for group in parameter_groups(model, weight_decay=0.1) for p in group["params"]}
    assert kept == {id(p) for key, p in model.named_parameters() if not key.startswith("stem.")}
    with pytest.raises(UsageError, match="freeze fewer"):
        parameter_groups(model.requires_grad_(False), weight_decay=0.1)
    with pytest.raises(UsageError, match="layer_decay"):
        parameter_groups(meta("replknet_nano"), weight_decay=0.1, layer_decay=0)


def test_layer_decay_that_would_do_nothing_is_refused():
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(30)))
    with pytest.raises(UsageError, match="does not tell its layers"):
        parameter_groups(model, weight_decay=0.1, layer_decay=0.5)
