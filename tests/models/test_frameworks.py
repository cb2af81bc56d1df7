"""Backbones as other libraries build them: transformers' TimmBackbone and segmentation-models-pytorch's `tu-` encoders.

Both are skipped where the library is not installed; the extra `dev` has them.
"""

import pytest
import timm
import torch

import replknet
from replknet.export.hub import save_model

X = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def whole(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("replknet_nano", **kwargs)


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="needs pip install transformers")


@pytest.fixture
def smp():
    return pytest.importorskip("segmentation_models_pytorch", reason="needs pip install segmentation-models-pytorch")


@pytest.mark.parametrize("out_indices", [(1, 2, 3), (0, 2), (-1,)], ids=str)
@pytest.mark.parametrize("form", ["train", "fused"])
def test_transformers_reads_a_saved_model(transformers, form, out_indices, trained, tmp_path):
    model = trained(whole(num_classes=7))
    want = model.forward_intermediates(X, indices=list(out_indices), intermediates_only=True)
    source = f"local-dir:{save_model(model if form == 'train' else replknet.reparameterize(model), tmp_path / 'nano')}"
    backbone = transformers.TimmBackbone.from_pretrained(source, out_indices=out_indices).eval()
    if form == "train":
        # What docs/models.md says: transformers has set the running statistics of all batch norms to 0 and 1.
        same = timm.create_model(source, pretrained=True, features_only=True, out_indices=out_indices)
        backbone._backbone.load_state_dict(same.state_dict())
    got = backbone(X, output_hidden_states=True)
    assert backbone.channels == [feature.shape[1] for feature in want]
    # Nothing beyond the last map is kept.
    assert len(got.hidden_states) == range(4)[max(out_indices, key=lambda i: i % 4)] + 1
    for a, b in zip(got.feature_maps, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_transformers_trains_and_freezes(transformers):
    config = transformers.TimmBackboneConfig(
        backbone="replknet_nano", use_pretrained_backbone=False, out_indices=(1, 3), freeze_batch_norm_2d=True
    )
    backbone = transformers.AutoBackbone.from_config(config)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in backbone.modules())
    sum(feature.square().mean() for feature in backbone(X).feature_maps).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


def test_transformers_upernet(transformers):
    backbone = transformers.TimmBackboneConfig(
        backbone="replknet_nano", use_pretrained_backbone=False, out_indices=(0, 1, 2, 3)
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, num_labels=5, hidden_size=16, auxiliary_in_channels=96, auxiliary_channels=8
    )
    network = transformers.UperNetForSemanticSegmentation(config).eval()
    assert network(X).logits.shape == (2, 5, 64, 96)


@pytest.mark.parametrize("decoder", ["Unet", "FPN", "UPerNet"])
def test_smp_decoders(smp, decoder):
    network = getattr(smp, decoder)("tu-replknet_tiny", encoder_weights=None, in_channels=4, classes=3)
    images = torch.cat([X, X[:, :1]], 1)
    out = network(images)
    assert out.shape == (2, 3, 64, 96)
    out.square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_smp_encoder_hands_out_the_stages(smp, trained):
    # The stem's stride of 2 makes four levels, where the encoders expect five.
    network = smp.Unet(
        "tu-replknet_nano", encoder_weights=None, encoder_depth=4, decoder_channels=(32, 16, 8, 8), classes=3
    )
    encoder = trained(network).encoder
    same = timm.create_model("replknet_nano", features_only=True).eval()
    same.load_state_dict(encoder.model.state_dict())
    for a, b in zip(encoder(X)[1:], same(X), strict=True):
        assert torch.equal(a, b)


def test_smp_network_merges(smp, trained):
    network = trained(smp.FPN("tu-replknet_tiny", encoder_weights=None, classes=3)).double()
    want = network(X.double())
    merged = replknet.reparameterize(network)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in merged.encoder.modules())
    torch.testing.assert_close(merged(X.double()), want, rtol=1e-8, atol=1e-8)
