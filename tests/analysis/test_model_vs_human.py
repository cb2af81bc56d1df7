"""The plug-in for model-vs-human, against a stand-in with the toolbox's registry and look-up rules."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from replknet._errors import UsageError
from replknet.analysis.model_vs_human import register_with_model_vs_human
from replknet.data.transforms import IMAGENET_MEAN, IMAGENET_STD


@pytest.fixture
def toolbox(monkeypatch):
    """`modelvshuman.models.{registry,pytorch.model_zoo}` as far as a model's registration goes."""
    names: dict[str, list[str]] = {"pytorch": ["bagnet9"]}
    registry = ModuleType("modelvshuman.models.registry")

    def register_model(framework):
        def add(function):
            names[framework].append(function.__name__)
            return function

        return add

    vars(registry).update(register_model=register_model, list_models=lambda framework: list(names[framework]))
    zoo = ModuleType("modelvshuman.models.pytorch.model_zoo")
    vars(zoo)["bagnet9"] = lambda *_: None
    modules = {"registry": registry, "pytorch": ModuleType("p"), "pytorch.model_zoo": zoo}
    monkeypatch.setitem(sys.modules, "modelvshuman", ModuleType("modelvshuman"))
    monkeypatch.setitem(sys.modules, "modelvshuman.models", ModuleType("modelvshuman.models"))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"modelvshuman.models.{name}", module)

    class Toolbox:
        listed = names["pytorch"]

        @staticmethod
        def load(name):
            return getattr(zoo, name)(name)

    return Toolbox


class Echo(nn.Module):
    """Logits that hold the mean colour of what the network was given, and the size."""

    def forward(self, x):
        logits = torch.zeros(len(x), 1000)
        logits[:, :3] = x.mean((2, 3)).cpu()
        logits[:, 3], logits[:, 4] = x.shape[2], x.shape[3]
        return logits


def as_the_toolbox_gives(picture):
    return (picture - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


def test_own_mean_and_std_replace_the_toolboxs(toolbox):
    register_with_model_vs_human("mine", Echo, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))
    model = toolbox.load("mine")
    picture = torch.rand(3, 224, 224, generator=torch.Generator().manual_seed(0))
    images = torch.stack([as_the_toolbox_gives(picture)] * 2)
    given = images.clone()
    logits = model.forward_batch(images)
    expected = (picture.mean((1, 2)) - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.5, 0.25, 0.2])
    assert isinstance(logits, np.ndarray)
    assert np.allclose(logits[0, :3], expected, atol=1e-5)
    assert logits[1, 3] == 224
    # The toolbox's batch is used for other models too.
    assert torch.equal(images, given)
    assert np.allclose(model.softmax(logits).sum(1), 1, atol=1e-5)
    assert model.to_numpy(torch.ones(2, dtype=torch.bfloat16)).dtype == np.float32


def test_normalisation_comes_from_the_models_configuration(toolbox):
    class Configured(Echo):
        pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # noqa: RUF012 - as timm has it

    register_with_model_vs_human("configured", Configured, size=(96, 64))
    logits = toolbox.load("configured").forward_batch(as_the_toolbox_gives(torch.full((3, 224, 224), 0.75))[None])
    assert np.allclose(logits[0, :5], [0.5, 0.5, 0.5, 96, 64], atol=1e-4)


def test_registering_twice_replaces(toolbox):
    for mean in (0.0, 1.0):
        register_with_model_vs_human("mine", Echo, mean=(mean,) * 3, std=(1.0,) * 3)
    assert toolbox.listed == ["bagnet9", "mine"]
    zeros = as_the_toolbox_gives(torch.zeros(3, 8, 8))[None]
    assert toolbox.load("mine").forward_batch(zeros)[0, 0] == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50", "torchvision name"),
        ("bagnet9", "a model 'bagnet9' of its own"),
        ("replknet-31b", "Python identifier"),
    ],
)
def test_names_that_cannot_be_used(toolbox, name, message):
    with pytest.raises(UsageError, match=message):
        register_with_model_vs_human(name, Echo)


def test_without_the_toolbox():
    assert "modelvshuman" not in sys.modules
    with pytest.raises(UsageError, match="cannot be imported"):
        register_with_model_vs_human("mine", Echo)
