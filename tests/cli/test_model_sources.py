"""From a word on the command line to a network."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import replknet
from replknet._errors import RunError, UsageError
from replknet.cli._model_sources import ModelSource, file_digest, reset_weights, set_image_size, silent_scales


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A user's file and an importable module with functions that make networks."""
    text = (
        "import torch\nfrom torch import nn\n\nnet = nn.Conv2d(3, 4, 3)\nnumber = 7\n\n\n"
        "def build(width=4):\n    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))\n\n\n"
        "def broken():\n    return 'a string'\n"
    )
    (tmp_path / "my_nets.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path / "my_nets.py"
    sys.modules.pop("my_nets", None)


class TestParsing:
    def test_all_options(self):
        source = ModelSource.parse("resnet18,weights=~/a.pth,merged,label=my net,layer=layer3,drop_rate:=0.5,act:=relu")
        assert source == ModelSource(
            name="resnet18",
            weights=Path("~/a.pth").expanduser(),
            merged=True,
            label="my net",
            layer="layer3",
            arguments={"drop_rate": 0.5, "act": "relu"},
        )

    @pytest.mark.parametrize(
        ("text", "label"),
        [
            ("resnet18", "resnet18"),
            ("replknet_nano,merged", "replknet_nano merged"),
            ("hf-hub:org/net", "net"),
            ("folder/my.py:build", "my.py:build"),
        ],
    )
    def test_default_labels(self, text, label):
        assert ModelSource.parse(text).label == label

    @pytest.mark.parametrize(
        "text", ["", ",pretrained", "resnet18,weight=a.pth", "resnet18,pretrained=yes", "resnet18,x"]
    )
    def test_mistakes(self, text):
        with pytest.raises(UsageError, match=r"names no model|unknown option"):
            ModelSource.parse(text)


class TestBuilding:
    def test_timm_with_arguments(self):
        model = ModelSource.parse("resnet18,num_classes:=7").build()
        assert model.get_classifier().out_features == 7
        assert not model.training

    def test_weights_and_merging(self, tmp_path):
        torch.manual_seed(3)
        trained = timm.create_model("replknet_nano").eval()
        torch.save({"model": trained.state_dict()}, tmp_path / "w.pth")
        image = torch.randn(1, 3, 64, 64)
        plain = ModelSource.parse(f"replknet_nano,weights={tmp_path}/w.pth").build()
        merged = ModelSource.parse(f"replknet_nano,weights={tmp_path}/w.pth,merged").build()
        assert torch.equal(plain(image), trained(image))
        assert torch.allclose(merged(image), trained(image), atol=1e-4)
        assert len(merged.state_dict()) < len(plain.state_dict())

    def test_torchvision(self, tmp_path):
        import torchvision

        torch.manual_seed(0)
        model = torchvision.models.resnet18()
        torch.save(model.state_dict(), tmp_path / "w.pth")
        built = ModelSource.parse(f"torchvision:resnet18,weights={tmp_path}/w.pth").build()
        assert torch.equal(built.fc.weight, model.fc.weight)
        assert ModelSource.parse("torchvision:inception_v3").build() is not None

    def test_own_functions_classes_and_modules(self, own):
        for text in ("my_nets:build", "my_nets.py:build", f"{own}:build", "my_nets.py:net"):
            assert isinstance(ModelSource.parse(text).build(), nn.Module)
        assert ModelSource.parse("my_nets:build,width:=9").build()[0].out_channels == 9

    def test_random_weights_repeat_by_seed(self, own):
        for text in ("resnet18", "torchvision:resnet18", "my_nets:build", "my_nets:net"):
            source = ModelSource.parse(text)
            first, again, other = (next(source.build_untrained(seed).parameters()).clone() for seed in (0, 0, 1))
            assert torch.equal(first, again)
            assert not torch.equal(first, other)

    def test_random_numbers_of_the_caller_are_left_alone(self):
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        ModelSource.parse("resnet18").build_untrained(0)
        assert torch.equal(torch.rand(1), expected)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("resnet181", "near names: .*resnet18"),
            ("torchvision:resnet181", "near names: .*resnet18"),
            ("resnet18,weights=none.pth", "none.pth"),
            ("resnet18,weights=none.pth,pretrained", "not both"),
            ("resnet18,wings:=2", "does not take this argument"),
            ("torchvision:resnet18,wings:=2", "does not take this argument"),
            ("no_such_module:build", "no module 'no_such_module'"),
            ("none.py:build", "none.py: no such file"),
            ("my_nets:biuld", "near names: build"),
            ("my_nets:number", "a function or class"),
            ("my_nets:broken", "gave a str"),
            ("my_nets:build,pretrained", "no meaning for your own function"),
        ],
    )
    def test_mistakes(self, own, text, message):
        with pytest.raises(UsageError, match=message):
            ModelSource.parse(text).build()

    def test_wrong_arguments_of_own_functions(self, own):
        with pytest.raises(RunError, match=r"my_nets:build\(wings=2\) failed"):
            ModelSource.parse("my_nets:build,wings:=2").build()

    def test_what_a_result_file_says(self, tmp_path):
        (tmp_path / "w.pth").write_bytes(b"abc")
        described = ModelSource.parse(f"resnet18,weights={tmp_path}/w.pth").describe()
        assert described["weights_sha256"] == file_digest(tmp_path / "w.pth")
        assert described["weights_sha256"].startswith("ba7816bf")


class TestImageSize:
    def test_position_embeddings_grow(self):
        model = timm.create_model("vit_tiny_patch16_224", depth=1)
        set_image_size(model, (64, 96))
        assert model.forward_features(torch.randn(1, 3, 64, 96)).shape == (1, 25, 192)

    def test_no_multiple_of_the_patch(self):
        model = timm.create_model("vit_tiny_patch16_224", depth=1)
        with pytest.raises(UsageError, match=r"patches of 16 × 16.*use 992 × 992 or 1008 × 1008"):
            set_image_size(model, (1000, 1000), "vit_tiny")

    def test_convolutional_networks_take_any_size(self):
        model = timm.create_model("replknet_nano")
        set_image_size(model, (97, 101))
        assert model(torch.randn(2, 3, 97, 101)).shape == (2, 1000)


def test_silent_branches_are_counted():
    assert silent_scales(timm.create_model("resnet18")) == 8
    assert silent_scales(timm.create_model("resnet18", zero_init_last=False)) == 0
    assert silent_scales(timm.create_model("convnext_atto")) > 0
    assert silent_scales(replknet.models.create_model("replknet_nano")) == 0


def test_layers_that_cannot_start_anew_are_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with pytest.raises(UsageError, match=r"layer 0 \(Odd\)"):
        reset_weights(nn.Sequential(Odd()))


class TestCheckpointsOfOurs:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        """What `replknet train` writes, as far as a network's identity goes."""
        torch.manual_seed(1)
        model = timm.create_model("replknet_nano", num_classes=10, in_chans=1, stem_stride=2)
        told = {"model": "replknet_nano", "num_classes": 10, "in_chans": 1, "model_kwargs": {"stem_stride": 2}}
        told |= {"mean": [0.2], "std": [0.4], "image_size": 32, "class_names": list("0123456789")}
        path = tmp_path / "digits" / "checkpoints" / "best.ckpt"
        path.parent.mkdir(parents=True)
        torch.save({"state_dict": model.state_dict(), "replknet": told}, path)
        return path, model.eval()

    def test_the_file_alone_names_the_network(self, checkpoint):
        path, model = checkpoint
        source = ModelSource.parse(str(path))
        image = torch.randn(1, 1, 32, 32)
        built = source.build()
        assert source.label == "digits best"
        assert source.is_trained
        assert torch.equal(built(image), model(image))
        assert built.pretrained_cfg["mean"] == (0.2,)
        assert built.pretrained_cfg["std"] == (0.4,)

    def test_its_untrained_self_has_the_same_shape(self, checkpoint):
        path, model = checkpoint
        untrained = ModelSource.parse(str(path)).build_untrained()
        assert {k: v.shape for k, v in untrained.state_dict().items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }
        assert not torch.equal(untrained.head.weight, model.head.weight)

    def test_other_files_need_a_name(self, checkpoint, tmp_path):
        torch.save(checkpoint[1].state_dict(), tmp_path / "raw.pth")
        with pytest.raises(UsageError, match="does not tell its network"):
            ModelSource.parse(str(tmp_path / "raw.pth")).build()
        with pytest.raises(UsageError, match="no such file"):
            ModelSource.parse(str(tmp_path / "none.ckpt")).build()
        with pytest.raises(UsageError, match="two files of weights"):
            ModelSource.parse(f"{checkpoint[0]},weights={tmp_path}/raw.pth")
