"""Every wrapper, prefix, layout and form loads; everything else is one clear error."""

import argparse
import copy
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

import replknet
from replknet._errors import RunError, UsageError
from replknet.models import RepLKNet, load_checkpoint, read_state_dict

SMALL = {"kernel_sizes": (9, 7, 5, 3), "layers": (1, 1, 2, 1), "channels": (8, 12, 16, 20), "small_kernel": 3}


def small(**kwargs) -> RepLKNet:
    torch.manual_seed(kwargs.pop("seed", 0))
    return RepLKNet(**{**SMALL, "num_classes": 7, **kwargs})


def to_mm(state):
    """mmpretrain's layout, written from its description."""
    renamed = {}
    for name, value in state.items():
        if name.startswith("head."):
            renamed[name.replace("head.", "head.fc.")] = value
        elif name.startswith("norm."):
            renamed[f"backbone.stages.3.{name}"] = value
        else:
            renamed[f"backbone.{name}"] = value
    return renamed


def prefixed(prefix):
    return lambda state: {prefix + name: value for name, value in state.items()}


def noise(state):
    return {name: torch.zeros_like(value) for name, value in state.items()}


WRAPPERS = {
    "raw": lambda s: s,
    "model": lambda s: {"model": s, "epoch": 3},
    "module": lambda s: {"module": s},
    "state_dict": lambda s: {"state_dict": s, "meta": {"epoch": 1}},
    "model_ema": lambda s: {"model": noise(s), "model_ema": s},
    "timm": lambda s: {"state_dict": noise(s), "state_dict_ema": s, "args": argparse.Namespace(lr=np.float64(0.1))},
    "nested": lambda s: {"state_dict": {"model": s}},
    "backbone.": prefixed("backbone."),
    "module.": prefixed("module."),
    "module.backbone.": prefixed("module.backbone."),
    "compiled": prefixed("_orig_mod.module."),
    "mmpretrain": lambda s: {"state_dict": to_mm(s), "meta": {}},
    "22k": lambda s: {"model": {k.replace("head.", "head.cls_22k."): v for k, v in s.items()}},
    "lightning": lambda s: {
        "pytorch-lightning_version": "2.6.0",
        "state_dict": {**prefixed("model.")(s), "criterion.weight": torch.ones(7)},
    },
    "lightning-ema": lambda s: {
        "pytorch-lightning_version": "2.6.0",
        "state_dict": prefixed("model.")(noise(s)),
        "model_ema": s,
    },
    "averaged": lambda s: {"state_dict": {"n_averaged": torch.tensor(3), **prefixed("module.")(s)}},
}


@pytest.mark.parametrize("form", ["train", "merged"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_loads_exactly(wrapper, form, trained, tmp_path):
    source = trained(small(form=form))
    file = tmp_path / "weights.pth"
    torch.save(WRAPPERS[wrapper](source.state_dict()), file)
    model = small(form=form, seed=1).eval()
    report = load_checkpoint(model, file)
    assert report.is_exact
    assert set(report.matched) == set(source.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(x), source(x))
    state = read_state_dict(file)
    assert state.keys() == source.state_dict().keys()
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in state.items())


def test_moving_average_can_be_declined(tmp_path):
    state = small().state_dict()
    torch.save({"model": state, "model_ema": noise(state)}, tmp_path / "both.pth")
    assert torch.equal(read_state_dict(tmp_path / "both.pth", use_ema=False)["head.weight"], state["head.weight"])
    assert not read_state_dict(tmp_path / "both.pth")["head.weight"].any()


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_safetensors_are_known_by_content(suffix, tmp_path):
    state = small().state_dict()
    safetensors.torch.save_file(state, tmp_path / f"weights{suffix}")
    assert load_checkpoint(small(seed=1), tmp_path / f"weights{suffix}").is_exact


def test_legacy_torch_format(tmp_path):
    torch.save(small().state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert load_checkpoint(small(seed=1), tmp_path / "old.pth").is_exact


@pytest.mark.parametrize("have", ["train", "merged", "fused"])
@pytest.mark.parametrize("want", ["train", "merged", "fused"])
@pytest.mark.parametrize("route", ["whole", "getter"])
def test_forms_meet_at_the_later_one(have, want, route, trained):
    train = trained(small()).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    wrap = {"whole": lambda m: m, "getter": lambda m: timm.models._features.FeatureGetterNet(m, (1, 3), prune=False)}
    answer = {"whole": lambda m: m(x), "getter": lambda m: torch.cat([f.flatten() for f in m(x)])}[route]
    wanted = answer(wrap[route](copy.deepcopy(train)))
    file = copy.deepcopy(train)
    if have != "train":
        replknet.reparameterize(file, fold_norms=have == "fused")
    model = wrap[route](small(form=want, seed=1, dtype=torch.float64).eval())
    report = load_checkpoint(model, file.state_dict())
    order = ["train", "merged", "fused"]
    net = model if route == "whole" else model.model
    assert net.form == order[max(order.index(have), order.index(want))]
    assert report.is_exact
    assert (report.converted is None) == (have == want)
    torch.testing.assert_close(answer(model), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("want", ["train", "merged"])
def test_what_timm_fused_loads_too(want, trained):
    source = timm.utils.model.reparameterize_model(trained(small()))
    model = small(form=want, seed=1).eval()
    assert load_checkpoint(model, source.state_dict()).is_exact
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(x), source(x))


def test_conversion_respects_the_training_mode(trained):
    model = small(seed=1).train()
    load_checkpoint(model, replknet.reparameterize(trained(small()), fold_norms=False).state_dict())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("feature_cls", ["list", "getter", "dict"])
@pytest.mark.parametrize("layout", ["raw", "mmpretrain", "backbone."])
def test_feature_wrappers_load_classifiers(feature_cls, layout, trained):
    torch.manual_seed(0)
    source = trained(timm.create_model("replknet_nano", num_classes=7))
    model = timm.create_model("replknet_nano", features_only=True, feature_cls=feature_cls).eval()
    report = load_checkpoint(model, WRAPPERS[layout](source.state_dict()), may_differ=("head", "norm", "model"))
    assert not report.missing
    maps = model(torch.ones(1, 3, 32, 32))
    last = (list(maps.values()) if isinstance(maps, dict) else maps)[-1]
    torch.testing.assert_close(last, source.forward_features(torch.ones(1, 3, 32, 32)))


@pytest.mark.parametrize("make", ["sync", "frozen"])
def test_other_norm_classes_load(make):
    source = small()
    model = convert_sync_batchnorm(small(seed=1)) if make == "sync" else small(norm_layer=FrozenBatchNorm2d)
    report = load_checkpoint(model, source.state_dict())
    assert report.is_exact
    assert torch.equal(model.stem[0].bn.weight, source.stem[0].bn.weight)


def test_other_timm_models_load_too(tmp_path):
    source = timm.create_model("resnet18", num_classes=5)
    torch.save({"state_dict": prefixed("module.")(source.state_dict())}, tmp_path / "r18.pth")
    assert load_checkpoint(timm.create_model("resnet18", num_classes=5), tmp_path / "r18.pth").is_exact


def test_new_head_must_be_named():
    model = small(num_classes=3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RunError, match=r"7 outputs, the model 3.*'head' in may_differ"):
        load_checkpoint(model, small(seed=1).state_dict())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    report = load_checkpoint(model, small(seed=1).state_dict(), may_differ="head")
    assert [name for name, _, _ in report.mismatched] == ["head.weight", "head.bias"]
    assert torch.equal(model.head.weight, before["head.weight"])
    assert torch.equal(model.norm.weight, small(seed=1).norm.weight)


def test_missing_and_unexpected_keys_are_listed():
    state = small().state_dict()
    del state["norm.bias"]
    state["auxiliary.weight"] = torch.zeros(2)
    with pytest.raises(RunError, match=r"1 missing \(norm\.bias\); 1 unexpected \(auxiliary\.weight\)"):
        load_checkpoint(small(), state)
    report = load_checkpoint(small(), state, may_differ=["norm", "auxiliary"])
    assert report.missing == ("norm.bias",)
    assert report.unexpected == ("auxiliary.weight",)
    assert "1 missing: norm.bias" in str(report)


def test_names_that_may_differ_are_whole_parts():
    state = small().state_dict()
    state["header.weight"] = torch.zeros(2)
    with pytest.raises(RunError, match=r"header\.weight"):
        load_checkpoint(small(), state, may_differ="head")


@pytest.mark.parametrize("form", ["train", "merged", "fused"])
def test_another_replknet_is_named(form):
    state = timm.create_model("replknet_31l", device="meta", form=form).state_dict()
    model = timm.create_model("replknet_31b", device="meta")
    with pytest.raises(RunError, match=r"does not fit replknet_31b.*another architecture.*fits replknet_31l"):
        load_checkpoint(model, state)
    assert model.form == "train"


def test_another_kind_of_network_is_said_to_be_one():
    state = timm.create_model("resnet18").state_dict()
    with pytest.raises(RunError, match="another architecture, and not of a RepLKNet"):
        load_checkpoint(small(), state)
    with pytest.raises(RunError, match=r"another architecture.*fits replknet_nano"):
        load_checkpoint(timm.create_model("resnet18"), timm.create_model("replknet_nano").state_dict())


class Bomb:
    def __reduce__(self):
        return (subprocess.call, ([sys.executable, "-c", "open('exploded', 'w')"],))


def broken_files(folder):
    whole = folder / "whole.pth"
    torch.save(small().state_dict(), whole)
    data = whole.read_bytes()
    old = folder / "old.pth"
    torch.save(small().state_dict(), old, _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(small().state_dict(), folder / "whole.safetensors")
    safe = (folder / "whole.safetensors").read_bytes()
    return {
        "empty": (b"", "it is empty"),
        "truncated": (data[: len(data) // 2], "damaged"),
        "cut-by-one": (data[:-1], "damaged"),
        "truncated-legacy": (old.read_bytes()[:5000], "damaged"),
        "truncated-safetensors": (safe[: len(safe) // 2], "damaged"),
        "page": (b"\n<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title>", "a web page"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        "text": (b"hello, these are no weights\n" * 30, "not a torch checkpoint"),
        "code": (pickle.dumps({"state_dict": Bomb()}), "checkpoint: Unsupported operand"),
        "list": (_saved([1, 2, 3]), "holds a list"),
        "tensor": (_saved(torch.zeros(3)), "holds a Tensor"),
        "no-tensors": (_saved({"epoch": 3, "model": {"a": 1}}), "holds no weights; at its top level: epoch, model"),
        "bomb": (_saved({"state_dict": Bomb()}), "would run code when opened"),
    }


def _saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_broken_files_are_one_clear_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, (content, message) in broken_files(tmp_path).items():
        file = tmp_path / f"{name}.pth"
        file.write_bytes(content)
        for read in (read_state_dict, lambda f: load_checkpoint(small(), f)):
            with pytest.raises(RunError, match=message) as caught:
                read(file)
            assert str(file) in str(caught.value), name
            assert "\n" not in str(caught.value), name
    assert not (tmp_path / "exploded").exists()


def test_bytes_flipped_inside_are_noticed(tmp_path):
    torch.save(small().state_dict(), tmp_path / "whole.pth")
    data = bytearray((tmp_path / "whole.pth").read_bytes())
    data[100:160] = b"\xff" * 60
    (tmp_path / "flipped.pth").write_bytes(data)
    with pytest.raises(RunError, match=r"flipped\.pth"):
        read_state_dict(tmp_path / "flipped.pth")


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(UsageError, match="there is no file"):
        read_state_dict(tmp_path / "none.pth")
    with pytest.raises(UsageError, match="is a folder"):
        read_state_dict(tmp_path)


def test_norms_of_stages_load_from_segmentation_backbones():
    source = small(num_classes=0, norm_features=True)
    state = {f"backbone.{k}": v for k, v in source.state_dict().items() if not k.startswith("norm.")}
    state["decode_head.conv.weight"] = torch.zeros(1)
    model = small(num_classes=0, norm_features=True, seed=1)
    report = load_checkpoint(model, state, may_differ=("decode_head", "norm"))
    assert report.missing == ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    assert torch.equal(model.stages[3].norm.weight, source.stages[3].norm.weight)


def test_a_model_with_a_backbone_inside(trained):
    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = small(num_classes=0)
            self.decoder = nn.Conv2d(20, 2, 1)

    source = trained(small(num_classes=0))
    model = Segmenter()
    report = load_checkpoint(model, source.state_dict(), may_differ="decoder")
    assert report.missing == ("decoder.weight", "decoder.bias")
    whole = Segmenter()
    assert load_checkpoint(whole, {"state_dict": model.state_dict()}).is_exact
    merged = replknet.reparameterize(copy.deepcopy(model).eval())
    assert load_checkpoint(whole, merged.state_dict()).is_exact
    assert whole.backbone.form == "fused"
    assert model.backbone.form == "train"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["replknet_31b", "replknet_31l", "replknet_xl"])
def test_official_sized_state_dicts_load(name, tmp_path):
    for form in ("train", "merged"):
        source = timm.create_model(name, form=form).half()
        torch.save({"model": source.state_dict()}, tmp_path / "official.pth")
        model = timm.create_model(name)
        report = load_checkpoint(model, tmp_path / "official.pth")
        assert report.is_exact
        assert len(report.matched) == {"train": 1027 if "xl" in name else 1171, "merged": 931}[form]
        assert model.form == form
        assert torch.equal(model.head.weight, source.head.weight.float())
