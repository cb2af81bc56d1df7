"""Feature maps through every wrapper of timm's, as other frameworks ask for them."""

import pytest
import timm
import torch
from torch import nn

import replknet

X = torch.randn(2, 3, 40, 33, generator=torch.Generator().manual_seed(0))
CHANNELS, REDUCTIONS = [24, 48, 96, 192], [2, 4, 8, 16]


def nano(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("replknet_nano", **kwargs)


def reference_maps(model):
    x, maps = model.stem(X), []
    for index, stage in enumerate(model.stages):
        x = stage(model.transitions[index - 1](x) if index else x)
        maps.append(x)
    return maps


@pytest.mark.parametrize("feature_cls", [None, "list", "dict", "getter", "hook", "fx"])
@pytest.mark.parametrize("out_indices", [None, (0,), (1, 3), (2, 1), (-1,), 2], ids=str)
def test_maps_are_the_stages_outputs(feature_cls, out_indices, trained):
    if feature_cls in ("hook", "fx") and out_indices in (2, (2, 1), (-1,)):
        pytest.skip("timm's hook and fx wrappers leave order and negative indices to the caller")
    wanted = {"feature_cls": feature_cls, "out_indices": out_indices}
    model = trained(nano(features_only=True, **{k: v for k, v in wanted.items() if v is not None}))
    whole = trained(nano(num_classes=0))
    whole.load_state_dict(_as_whole(model), strict=False)
    got = model(X)
    got = list(got.values()) if isinstance(got, dict) else got
    taken = {None: [0, 1, 2, 3], (-1,): [3], 2: [2, 3]}.get(out_indices, out_indices)
    maps = reference_maps(whole)
    assert len(got) == len(taken)
    for index, feature in zip(sorted(taken), got, strict=True):
        torch.testing.assert_close(feature, maps[index])
    if feature_cls not in ("hook", "fx"):
        assert model.feature_info.channels() == [CHANNELS[i] for i in sorted(taken)]
        assert model.feature_info.reduction() == [REDUCTIONS[i] for i in sorted(taken)]


def _as_whole(model):
    state = {}
    for name, value in model.state_dict().items():
        name = name.removeprefix("model.").removeprefix("graph_module.")
        for part in ("stages", "transitions", "stem"):
            name = name.replace(f"{part}_", f"{part}.", 1) if name.startswith(f"{part}_") else name
        state[name] = value
    return state


@pytest.mark.parametrize("feature_cls", ["list", "getter"])
@pytest.mark.parametrize(("out_indices", "kept"), [((0,), 1), ((1, 2), 3), ((3,), 4)])
def test_nothing_beyond_the_last_map_is_kept(feature_cls, out_indices, kept):
    model = nano(features_only=True, feature_cls=feature_cls, out_indices=out_indices)
    blocks = {n.split(".blocks")[0] for n, _ in model.named_parameters() if ".blocks." in n}
    assert len(blocks) == kept
    assert not [n for n, _ in model.named_parameters() if n.endswith(("head.weight", "norm.weight"))]


@pytest.mark.parametrize("feature_cls", ["list", "getter"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("norm_features", [False, True, (1, 3), (0,)], ids=str)
def test_no_parameter_is_without_gradient(feature_cls, checkpointing, norm_features):
    model = nano(features_only=True, feature_cls=feature_cls, out_indices=(1, 3), norm_features=norm_features)
    model.set_grad_checkpointing(checkpointing)
    sum(feature.square().sum() for feature in model(X)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("feature_cls", ["list", "getter"])
def test_normalised_maps_do_not_change_what_flows_on(feature_cls, trained):
    plain = trained(nano(features_only=True, feature_cls=feature_cls))
    normed = trained(nano(features_only=True, feature_cls=feature_cls, norm_features=(0, 2)))
    own = {n for n, _ in normed.named_modules() if isinstance(_, nn.BatchNorm2d)}
    own -= {n for n, _ in plain.named_modules() if isinstance(_, nn.BatchNorm2d)}
    assert {n.replace("model.", "").replace("stages.", "stages_") for n in own} == {"stages_0.norm", "stages_2.norm"}
    normed.load_state_dict(plain.state_dict(), strict=False)
    for index, (a, b) in enumerate(zip(plain(X), normed(X), strict=True)):
        if index in (0, 2):
            prefix = "model.stages." if feature_cls == "getter" else "stages_"
            a = normed.get_submodule(f"{prefix}{index}.norm")(a)
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize("feature_cls", ["list", "getter"])
@pytest.mark.parametrize(
    ("out_indices", "message"), [((), "is empty"), ((4,), "out of range"), ((0, -5), "out of range"), (5, "the last 5")]
)
def test_wrong_indices_say_so(feature_cls, out_indices, message):
    with pytest.raises(ValueError, match=message):
        nano(features_only=True, feature_cls=feature_cls, out_indices=out_indices)


def test_what_transformers_backbone_does(trained):
    """Its TimmBackbone swaps `return_layers` to get all maps, named as `feature_info` names modules."""
    model = trained(nano(features_only=True, out_indices=(1, 3)))
    some = model(X)
    chosen = {layer["module"]: str(layer["index"]) for layer in model.feature_info.get_dicts()}
    every = {layer["module"]: str(i) for i, layer in enumerate(model.feature_info.info)}
    model.return_layers = every
    hidden = model(X)
    model.return_layers = chosen
    assert len(hidden) == 4
    for want, got in zip(some, (hidden[1], hidden[3]), strict=True):
        torch.testing.assert_close(got, want)
    assert len(model(X)) == 2


def test_forward_intermediates_of_a_classifier(trained):
    model = trained(nano())
    last, maps = model.forward_intermediates(X, indices=[0, -1], norm=True)
    torch.testing.assert_close(last, model.forward_features(X))
    torch.testing.assert_close(maps[1], model.norm(last))
    torch.testing.assert_close(model.forward_head(last), model(X))
    early, maps = model.forward_intermediates(X, indices=[1], stop_early=True)
    torch.testing.assert_close(early, maps[0])
    with pytest.raises(ValueError, match="NCHW only"):
        model.forward_intermediates(X, output_fmt="NHWC")


def test_pruned_classifier_keeps_its_head_when_nothing_is_cut():
    model = nano(num_classes=5)
    assert model.prune_intermediate_layers([0, 3], prune_head=False) == [0, 3]
    assert model(X).shape == (2, 5)
    assert model.prune_intermediate_layers([1]) == [1]
    assert model.num_features == 48
    assert model(X).shape == (2, 48, 10, 9)


@pytest.mark.parametrize("feature_cls", ["list", "getter"])
def test_feature_wrappers_reparameterize(feature_cls, trained):
    model = trained(nano(features_only=True, feature_cls=feature_cls)).double()
    want = model(X.double())
    fused = replknet.reparameterize(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    for a, b in zip(fused(X.double()), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
