"""From a name to a model, and what wrong requests get."""

import pytest
import timm
import torch
from timm.models import save_for_hf

import replknet
from replknet._errors import RunError, UsageError
from replknet.export.hub import save_model
from replknet.models import create_model


def test_names_of_ours_and_of_timm():
    assert type(create_model("replknet_nano", num_classes=5)).__name__ == "RepLKNet"
    assert create_model("resnet18", num_classes=5, in_chans=1).conv1.in_channels == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("replknet_31c", "near names:.*replknet_31"),
        ("replknet31b", "near names:.*replknet_31b"),
        ("zzzz", "unknown model 'zzzz'"),
        ("replknet_31b.in2k", "no weights tagged 'in2k'; known:.*in1k_224"),
        ("local-dir:/nonexistent", "no config.json"),
        ("ftp:model", "unknown scheme 'ftp'"),
    ],
)
def test_unknown_names_get_near_ones(name, message):
    with pytest.raises(UsageError, match=message):
        create_model(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "a.pth", "pretrained": True}, "not both"),
        ({"weights": "/nonexistent/a.pth"}, "there is no file"),
        ({"num_classes": -1}, "0 or more"),
        ({"kernel_size": 3}, "does not take this argument"),
    ],
)
def test_wrong_requests(arguments, message):
    with pytest.raises(UsageError, match=message):
        create_model("replknet_nano", **arguments)


def test_even_kernel_is_one_clear_line():
    with pytest.raises(ValueError, match=r"must be odd.*\[13, 12, 9, 5\]"):
        create_model("replknet_nano", kernel_sizes=(13, 12, 9, 5))


@pytest.mark.parametrize("name", ["replknet_nano", "resnet18"])
def test_classes_and_channels_come_from_the_file(name, tmp_path):
    source = timm.create_model(name, num_classes=7, in_chans=1).eval()
    torch.save({"state_dict": source.state_dict()}, tmp_path / "w.pth")
    model = create_model(name, weights=tmp_path / "w.pth").eval()
    x = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x), source(x))
    with pytest.raises(RunError, match="7 outputs, the model 3"):
        create_model(name, weights=tmp_path / "w.pth", num_classes=3)
    head = timm.get_pretrained_cfg(name).classifier
    new = create_model(name, weights=tmp_path / "w.pth", num_classes=3, checkpoint_may_differ=head)
    assert new(x.repeat(2, 1, 1, 1)).shape == (2, 3)


@pytest.mark.parametrize("form", ["train", "merged", "fused"])
def test_pretrained_file_through_timm_in_every_form(form, trained, tmp_path):
    source = trained(timm.create_model("replknet_nano", num_classes=1000))
    if form != "train":
        replknet.reparameterize(source, fold_norms=form == "fused")
    torch.save({"model": source.state_dict()}, tmp_path / "official.pth")
    overlay = {"file": str(tmp_path / "official.pth")}
    model = timm.create_model("replknet_nano", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert model.form == form
    assert torch.equal(model(x), source(x))


def test_pretrained_file_with_another_head_and_input(trained, tmp_path):
    source = trained(timm.create_model("replknet_nano"))
    torch.save(source.state_dict(), tmp_path / "official.pth")
    overlay = {"file": str(tmp_path / "official.pth")}
    model = timm.create_model(
        "replknet_nano", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4, in_chans=1
    ).eval()
    assert torch.equal(model.stages[3].blocks[0].pw1.conv.weight, source.stages[3].blocks[0].pw1.conv.weight)
    assert torch.equal(model.norm.weight, source.norm.weight)
    assert model(torch.ones(1, 1, 32, 32)).shape == (1, 4)


@pytest.mark.parametrize("form", ["train", "fused"])
def test_hub_folder_round_trip(form, trained, tmp_path):
    source = trained(create_model("replknet_nano", num_classes=6))
    if form == "fused":
        replknet.reparameterize(source)
    save_for_hf(source, tmp_path, safe_serialization=True)
    model = create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert model.form == form
    assert torch.equal(model(x), source(x))


def test_models_without_weights_say_so():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for replknet_nano"):
        create_model("replknet_nano", pretrained=True)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_damaged_folder_is_named(tmp_path, file):
    folder = save_model(create_model("replknet_nano", num_classes=3), tmp_path / "m")
    (folder / file).write_bytes((folder / file).read_bytes()[:100])
    with pytest.raises(RunError, match=r"local-dir:.*/m: its files are damaged"):
        create_model(f"local-dir:{folder}", pretrained=True)
