"""The backbone is the timm model: same code, same names, same numbers; and what configs add to it."""

import pytest
import timm
import torch
from torch import nn

from replknet._errors import RunError, UsageError
from replknet.models.replknet import RepLKNet
from replknet.tasks.openmmlab import require

require("segmentation")
from mmengine.registry import MODELS  # noqa: E402

from replknet.tasks.openmmlab.backbone import RepLKNetBackbone, load_backbone  # noqa: E402


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 49, 64, generator=torch.Generator().manual_seed(0))


def build(**options) -> RepLKNetBackbone:
    torch.manual_seed(0)
    return MODELS.build({"type": "RepLKNet", "model": "replknet_nano", **options})


def test_same_maps_as_the_timm_model(images, trained):
    ours = trained(build())
    timms = timm.create_model("replknet_nano", num_classes=0).eval()
    timms.load_state_dict({**ours.state_dict(), **timms.norm.state_dict(prefix="norm.")})
    assert isinstance(ours, RepLKNet)
    expected = timms.forward_intermediates(images, intermediates_only=True)
    for got, want in zip(ours(images), expected, strict=True):
        assert torch.equal(got, want)
    assert ours.out_channels == [24, 48, 96, 192]


def test_every_argument_of_the_network(images):
    backbone = MODELS.build(
        {
            "type": "RepLKNet",
            "kernel_sizes": (9, 7),
            "layers": (1, 1),
            "channels": (8, 16),
            "small_kernel": None,
            "dw_ratio": 1.5,
            "ffn_ratio": 2.0,
            "in_chans": 3,
            "stem_stride": 2,
            "norm_features": (1,),
            "out_indices": (0, 1),
            "drop_path_rate": 0.2,
        }
    )
    assert [tuple(m.shape[1:]) for m in backbone.eval()(images)] == [(8, 25, 32), (16, 13, 16)]
    assert backbone.stages[0].blocks[0].large_kernel.lkb_origin.conv.kernel_size == (9, 9)
    assert backbone.stages[0].blocks[0].pw1.conv.out_channels == 12
    assert isinstance(backbone.stages[0].norm, nn.Identity)
    assert isinstance(backbone.stages[1].norm, nn.BatchNorm2d)


def test_only_wanted_stages_are_built_and_no_parameter_is_without_gradient(images):
    backbone = build(out_indices=(1, 2), norm_features=True)
    maps = backbone(images)
    assert [m.shape[1] for m in maps] == backbone.out_channels == [48, 96]
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_sync_batch_norm_is_per_model():
    synced, plain = build(norm_cfg={"type": "SyncBN", "requires_grad": True}), build()
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in synced.modules()) > 20
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in plain.modules())


def test_checkpointing_gives_the_same_gradients(images):
    grads = []
    for checkpointing in (False, True):
        backbone = build(grad_checkpointing=checkpointing)
        sum(m.square().mean() for m in backbone(images)).backward()
        grads.append([p.grad for p in backbone.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("frozen", [0, 2, 4])
def test_frozen_stages_stay(frozen, images):
    backbone = build(frozen_stages=frozen, norm_features=True).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
    sum(m.square().mean() for m in backbone(images)).backward()
    optimizer.step()
    moved = {name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])}
    kept = ["stem."] + [f"stages.{s}.blocks." for s in range(frozen)] + [f"transitions.{t}." for t in range(frozen - 1)]
    assert not [name for name in moved if name.startswith(tuple(kept))]
    assert any(name.startswith("stages.3.norm.") for name in moved)
    assert frozen == 4 or any(name.startswith(f"stages.{frozen}.blocks.") for name in moved)


def test_norm_eval_keeps_statistics(images):
    backbone = build(norm_eval=True).train()
    backbone(images)
    assert int(backbone.state_dict()["stem.0.bn.num_batches_tracked"]) == 0
    assert backbone.stem[0].bn.weight.requires_grad


def test_starts_from_a_classifier(tmp_path, trained):
    classifier = trained(timm.create_model("replknet_nano", num_classes=7))
    torch.save({"model": classifier.state_dict()}, tmp_path / "classifier.pth")
    backbone = build(init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "classifier.pth")}, norm_features=[3])
    backbone.init_weights()
    source = classifier.state_dict()
    own = backbone.state_dict()
    assert all(torch.equal(own[name], source[name]) for name in own if not name.startswith("stages.3.norm"))
    assert sum(name.startswith("stages.3.norm") for name in own) == 5


def test_starts_from_a_segmentors_or_detectors_file_and_into_fewer_stages(tmp_path, trained):
    donor = trained(build())
    state = {f"backbone.{name}": value for name, value in donor.state_dict().items()}
    state["decode_head.conv_seg.weight"] = torch.zeros(3, 4, 1, 1)
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "segmentor.pth")
    backbone = build(out_indices=(0, 1), pretrained=str(tmp_path / "segmentor.pth"))
    backbone.init_weights()
    assert all(torch.equal(value, donor.state_dict()[name]) for name, value in backbone.state_dict().items())


def test_wrong_weights_are_refused(tmp_path):
    torch.save(timm.create_model("replknet_tiny", num_classes=3).state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(RunError, match="another architecture: it fits replknet_tiny"):
        load_backbone(build(), tmp_path / "tiny.pth")
    torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "resnet.pth")
    with pytest.raises(RunError, match="holds no RepLKNet backbone"):
        load_backbone(build(), tmp_path / "resnet.pth")
    with pytest.raises(UsageError, match="neither a file nor the name of official weights"):
        load_backbone(build(), "replknet_31b.in1k_999")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "replknet_99"}, "unknown architecture"),
        ({"large_kernel_sizes": [31, 29, 27, 13]}, "called kernel_sizes here"),
        ({"use_checkpoint": True}, "called grad_checkpointing here"),
        ({"num_classes": 3}, "no num_classes"),
        ({"frozen_stages": 5}, "frozen_stages=5"),
        ({"init_cfg": {"type": "Kaiming"}}, "knows dict"),
        ({"pretrained": "a.pth", "init_cfg": {"type": "Pretrained", "checkpoint": "b"}}, "not both"),
        ({"out_indices": ()}, "out_indices is empty"),
    ],
    ids=str,
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
