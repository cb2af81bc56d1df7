"""The network: shapes, forms, features, groups, checkpointing; small members of the family stand for all."""

import copy
import io
import json
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from timm.utils.model import reparameterize_model
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

import replknet
from replknet.models.family import ARCHITECTURES
from replknet.models.replknet import RepLKNet

SMALL = {"kernel_sizes": (9, 7, 5, 3), "layers": (1, 1, 2, 1), "channels": (8, 12, 16, 20), "small_kernel": 3}
REFERENCE = Path(__file__).parents[2].parent / "shared" / "reference" / "state_dict_keys.json"


def small(**kwargs) -> RepLKNet:
    return RepLKNet(**{**SMALL, "num_classes": 7, **kwargs})


def norms(model):
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def image(*size, seed=0, **kwargs):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(**kwargs)


@pytest.mark.parametrize("form", ["train", "merged"])
@pytest.mark.parametrize("name", ["replknet_31b", "replknet_31l", "replknet_xl"])
def test_state_dict_is_the_release_s(name, form):
    if not REFERENCE.exists():
        pytest.skip(f"the list of the release's keys is not at {REFERENCE}")
    want = json.loads(REFERENCE.read_text())[name][form]
    model = RepLKNet(**ARCHITECTURES[name], form=form, device="meta")
    assert model.form == form
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == want
    assert list(model.state_dict()) == list(want)


@pytest.mark.parametrize(
    ("name", "train", "merged"),
    [
        ("replknet_31b", 79_864_168, 79_527_272),
        ("replknet_31l", 172_671_016, 172_165_672),
        ("replknet_xl", 335_435_752, 335_399_656),
    ],
)
def test_parameters_of_the_release(name, train, merged):
    for form, want in (("train", train), ("merged", merged)):
        model = timm.create_model(name, form=form, device="meta")
        assert sum(p.numel() for p in model.parameters()) == want


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_member_is_registered_and_runs_without_data(name):
    assert timm.is_model(name)
    model = timm.create_model(name, num_classes=11, device="meta")
    assert model(torch.empty(2, 3, 64, 96, device="meta")).shape == (2, 11)
    assert model.pretrained_cfg["first_conv"] == "stem.0.conv"
    assert model.pretrained_cfg["classifier"] == "head"
    assert model.get_submodule(model.pretrained_cfg["first_conv"]).in_channels == 3
    assert isinstance(model.get_classifier(), nn.Linear)


@pytest.mark.parametrize("size", [(1, 1), (33, 31), (17, 64), (8, 100)], ids=str)
@pytest.mark.parametrize("stem_stride", [1, 2, 4])
def test_any_image_size(size, stem_stride):
    model = small(stem_stride=stem_stride).eval()
    maps = model.forward_intermediates(image(2, 3, *size), intermediates_only=True)
    for index, feature in enumerate(maps):
        reduction = model.feature_info[index]["reduction"]
        assert feature.shape == (2, SMALL["channels"][index], -(-size[0] // reduction), -(-size[1] // reduction))
    assert model(image(2, 3, *size)).shape == (2, 7)


@pytest.mark.parametrize("in_chans", [1, 3, 12])
def test_input_channels(in_chans):
    assert small(in_chans=in_chans).eval()(image(1, in_chans, 32, 32)).shape == (1, 7)


def test_without_classes_the_output_is_pooled_normalised_features(trained):
    torch.manual_seed(0)
    model = trained(small(num_classes=0))
    x = image(2, 3, 40, 40)
    want = model.norm(model.forward_features(x)).mean((2, 3))
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_sizes": (9, 8, 5, 3)}, "must be odd"),
        ({"kernel_sizes": (9, -7, 5, 3)}, "must be odd and positive"),
        ({"kernel_sizes": (9, 7, 5)}, "one entry a stage"),
        ({"small_kernel": 5}, "small_kernel 5 is larger than kernel_size"),
        ({"small_kernel": 2}, "small_kernel must be odd"),
        ({"stem_stride": 3}, "must be 1, 2 or 4"),
        ({"form": "deploy"}, "accepted: train, merged, fused"),
        ({"norm_layer": "layernorm"}, "accepted: batchnorm2d, syncbatchnorm"),
        ({"norm_features": True}, "would get no gradient"),
        ({"norm_features": (4,), "num_classes": 0}, "do not exist"),
        ({"global_pool": ""}, "needs a pooling"),
        ({"layers": (1, 0, 1, 1)}, "must be positive"),
    ],
)
def test_wrong_arguments_say_what_is_accepted(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_kernels_beyond_the_operator_run_by_torch():
    model = small(kernel_sizes=(65, 7, 5, 3)).eval()
    assert torch.isfinite(model(image(1, 3, 32, 32))).all()


def test_drop_path_rises_over_layers_and_is_shared_within_one():
    model = small(drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])


FORMS = {
    "merge": lambda model: replknet.reparameterize(model, fold_norms=False),
    "fuse": replknet.reparameterize,
    "timm": reparameterize_model,
}


@pytest.mark.parametrize("route", FORMS)
@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, "syncbatchnorm", FrozenBatchNorm2d], ids=str)
def test_reparameterized_network_answers_the_same(route, norm_layer, trained):
    torch.manual_seed(0)
    model = trained(small(norm_layer=norm_layer, dw_ratio=1.5)).double()
    x = image(2, 3, 40, 33, dtype=torch.float64)
    want, features = model(x), model.forward_features(x)
    fused = FORMS[route](model)
    assert fused.form == ("merged" if route == "merge" else "fused")
    torch.testing.assert_close(fused(x), want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fused.forward_features(x), features, rtol=1e-10, atol=1e-10)
    # timm never asks the root, so that the norm in front of the head stays.
    assert len(norms(fused)) == {"fuse": 0, "timm": 1}.get(route, len(norms(fused)))
    before = {k: v.clone() for k, v in fused.state_dict().items()}
    again = FORMS[route](fused)
    assert again.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in again.state_dict().items())


def test_reparameterize_keeps_placement_and_flags(trained):
    model = trained(small()).bfloat16().to(memory_format=torch.channels_last)
    model.stages[0].requires_grad_(False)
    fused = replknet.reparameterize(model)
    assert fused is model
    assert {p.dtype for p in fused.parameters()} == {torch.bfloat16}
    assert not fused.training
    assert not any(p.requires_grad for p in fused.stages[0].parameters())
    assert all(p.requires_grad for p in fused.stages[1].parameters())
    assert fused.stem[0].conv.weight.is_contiguous(memory_format=torch.channels_last)
    x = image(1, 3, 32, 32, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    assert fused(x).dtype == torch.bfloat16


def test_reparameterize_refuses_training_mode_and_leaves_the_model_alone():
    model = small()
    before = model.state_dict().keys()
    for call in (replknet.reparameterize, lambda m: reparameterize_model(m, inplace=True)):
        with pytest.raises(ValueError, match="in training mode"):
            call(model)
    frozen_half = small().eval()
    frozen_half.stages[1].train()
    with pytest.raises(ValueError, match="in training mode"):
        replknet.reparameterize(frozen_half)
    assert model.state_dict().keys() == before == frozen_half.state_dict().keys()


def test_reparameterize_refuses_other_norms_before_it_begins():
    model = small(norm_layer=lambda channels: nn.GroupNorm(1, channels)).eval()
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match="GroupNorm has no running statistics"):
        replknet.reparameterize(model)
    assert model.state_dict().keys() == before


def test_reparameterize_inside_a_larger_model(trained):
    torch.manual_seed(0)
    model = trained(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ModuleDict({"net": small()})["net"])).double()
    x = image(2, 3, 32, 32, dtype=torch.float64)
    want = model(x)
    assert not norms(replknet.reparameterize(model))
    torch.testing.assert_close(model(x), want, rtol=1e-10, atol=1e-10)


def test_reparameterize_follows_timm_s_convention_on_other_models():
    torch.manual_seed(0)
    model = timm.create_model("repvgg_a0", num_classes=3).eval()
    x = image(1, 3, 64, 64)
    want = model(x)
    fused = replknet.reparameterize(model)
    assert not any("identity" in name or "conv_1x1" in name for name, _ in fused.named_parameters())
    torch.testing.assert_close(fused(x), want, rtol=1e-4, atol=1e-4)


def test_models_built_merged_or_fused_are_left_as_they_are():
    merged = small(form="merged").eval()
    state = {k: v.clone() for k, v in merged.state_dict().items()}
    replknet.reparameterize(merged, fold_norms=False)
    assert all(torch.equal(v, state[k]) for k, v in merged.state_dict().items())
    fused = small(form="fused").eval()
    state = {k: v.clone() for k, v in fused.state_dict().items()}
    replknet.reparameterize(fused)
    assert all(torch.equal(v, state[k]) for k, v in fused.state_dict().items())
    assert small(form="fused").training


def test_fused_model_is_saved_and_loaded_by_form(trained, tmp_path):
    model = replknet.reparameterize(trained(small()))
    torch.save(model.state_dict(), tmp_path / "fused.pth")
    again = small(form="fused").eval()
    again.load_state_dict(torch.load(tmp_path / "fused.pth"), strict=True)
    x = image(1, 3, 32, 32)
    assert torch.equal(again(x), model(x))


def test_fused_head_says_what_it_cannot_do(trained):
    model = replknet.reparameterize(trained(small()))
    with pytest.raises(NotImplementedError, match="num_classes=0"):
        model.forward_head(model.forward_features(image(1, 3, 32, 32)), pre_logits=True)
    with pytest.raises(NotImplementedError, match="before fusing"):
        model.reset_classifier(3)


def test_final_norm_stays_where_folding_it_would_be_wrong(trained):
    for arguments in ({"num_classes": 0}, {"global_pool": "max"}):
        model = trained(small(**arguments)).double()
        x = image(2, 3, 32, 32, dtype=torch.float64)
        want = model(x)
        assert norms(replknet.reparameterize(model)) == ["norm"]
        torch.testing.assert_close(model(x), want, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["replknet_31b", "replknet_31l", "replknet_xl"])
def test_fused_logits_in_float32(name, trained):
    torch.manual_seed(0)
    model = trained(timm.create_model(name))
    x = image(2, 3, 64, 96)
    with torch.inference_mode():
        want = model(x)
        got = replknet.reparameterize(model)(x)
    assert not norms(model)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("form", ["train", "fused"])
def test_copies_and_pickles(form, trained):
    model = trained(small(form=form))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = image(1, 3, 32, 32)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(again(x), model(x))
        assert again.form == form


def test_fused_model_exports_with_dynamic_batch(trained):
    model = replknet.reparameterize(trained(small()))
    x = image(2, 3, 32, 32)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    torch.testing.assert_close(program.module()(image(5, 3, 32, 32)), model(image(5, 3, 32, 32)))


def test_reset_classifier_keeps_placement():
    model = small(dtype=torch.float64)
    model.reset_classifier(3)
    assert model.head.weight.shape == (3, 20)
    assert model.head.weight.dtype == torch.float64
    model.reset_classifier(0, global_pool="")
    assert model(image(1, 3, 64, 64, dtype=torch.float64)).shape == (1, 20, 2, 2)


def test_checkpointing_changes_neither_gradients_nor_statistics(trained):
    torch.manual_seed(0)
    plain = trained(small()).train()
    spare = copy.deepcopy(plain)
    spare.set_grad_checkpointing()
    for model in (plain, spare):
        model(image(4, 3, 32, 32)).square().sum().backward()
    for (name, want), got in zip(plain.named_parameters(), spare.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, msg=name)
    for (name, want), got in zip(plain.named_buffers(), spare.buffers(), strict=True):
        assert torch.equal(got, want), name


def test_every_parameter_gets_a_gradient():
    model = small()
    model(image(4, 3, 32, 32)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_layer_decay_groups_of_the_release():
    model = timm.create_model("replknet_31b", device="meta")
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.7)
    assert sorted({round(g["lr_scale"], 12) for g in groups}) == [pytest.approx(0.7**i) for i in range(13, -1, -1)]
    assert {g["weight_decay"] for g in groups} == {0.0, 0.05}
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    named = dict(model.named_parameters())
    assert scale[id(named["stages.2.blocks.35.pw2.conv.weight"])] == pytest.approx(0.7**2)
    assert scale[id(named["transitions.2.0.conv.weight"])] == pytest.approx(0.7**2)
    assert scale[id(named["stem.0.conv.weight"])] == pytest.approx(0.7**13)


def test_accepts_device_and_dtype():
    model = small(device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float16)}
