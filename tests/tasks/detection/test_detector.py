"""Detectors: official layouts, merged and unmerged, any size, 16 bits, gradients by recomputation."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from torch import nn

import replknet
from replknet._errors import RunError, UsageError
from replknet.analysis.complexity import Complexity, complexity
from replknet.models.family import ARCHITECTURES
from replknet.models.weights import WEIGHTS
from replknet.tasks.detection.costs import FixedCost
from replknet.tasks.detection.detector import (
    build_detector,
    detection_scope,
    open_detector,
    prepare_for_inference,
    resize_test,
    set_classes,
)
from replknet.tasks.detection.official import COCO_CATEGORY_IDS, official_config, official_detector
from replknet.tasks.openmmlab.runner import load_weights

from .conftest import losses_of

OFFICIAL = [name for name, entry in WEIGHTS.items() if entry.task == "detection"]


def convolution(name: str, out: int, inner: int, kernel: int, *, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, inner, kernel, kernel)
    if bias:
        yield f"{name}.bias", (out,)


def norm(name: str, channels: int, *, running: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((f"{name}.{key}", (channels,)) for key in ("weight", "bias"))
    if running:
        yield from ((f"{name}.{key}", (channels,)) for key in ("running_mean", "running_var"))
        yield f"{name}.num_batches_tracked", ()


def backbone_layout(model: str, *, norm_features: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The release's segmentation/replknet.py with num_classes=None, as MMDetection 2.x saves it."""
    given = ARCHITECTURES[model]
    channels, ratio, small = given["channels"], given.get("dw_ratio", 1), given["small_kernel"]
    for unit, (inner, kernel, groups) in enumerate(((3, 3, 1), (0, 3, 0), (0, 1, 1), (0, 3, 0))):
        width = inner or (1 if groups == 0 else channels[0])
        yield from convolution(f"stem.{unit}.conv", channels[0], width, kernel, bias=False)
        yield from norm(f"stem.{unit}.bn", channels[0])
    for stage, (layers, c, large) in enumerate(zip(given["layers"], channels, given["kernel_sizes"], strict=True)):
        dw = int(c * ratio)
        for layer in range(layers):
            block, ffn = f"stages.{stage}.blocks.{2 * layer}", f"stages.{stage}.blocks.{2 * layer + 1}"
            yield from norm(f"{block}.prelkb_bn", c)
            for unit, (out, inner, kernel) in {
                f"{block}.pw1": (dw, c, 1),
                f"{block}.pw2": (c, dw, 1),
                f"{block}.large_kernel.lkb_origin": (dw, 1, large),
                **({f"{block}.large_kernel.small_conv": (dw, 1, small)} if small else {}),
                f"{ffn}.pw1": (4 * c, c, 1),
                f"{ffn}.pw2": (c, 4 * c, 1),
            }.items():
                yield from convolution(f"{unit}.conv", out, inner, kernel, bias=False)
                yield from norm(f"{unit}.bn", out)
            yield from norm(f"{ffn}.preffn_bn", c)
        if norm_features:
            yield from norm(f"stages.{stage}.norm", c)
        if stage + 1 < len(channels):
            wider = channels[stage + 1]
            for unit, (inner, kernel) in enumerate(((c, 1), (1, 3))):
                yield from convolution(f"transitions.{stage}.{unit}.conv", wider, inner, kernel, bias=False)
                yield from norm(f"transitions.{stage}.{unit}.bn", wider)


def fcos_layout(channels: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for level in range(3):
        yield from convolution(f"neck.lateral_convs.{level}.conv", 256, channels[level + 1], 1, bias=True)
    for level in range(5):
        yield from convolution(f"neck.fpn_convs.{level}.conv", 256, 256, 3, bias=True)
    for branch in ("cls", "reg"):
        for unit in range(4):
            yield from convolution(f"bbox_head.{branch}_convs.{unit}.conv", 256, 256, 3, bias=False)
            yield from norm(f"bbox_head.{branch}_convs.{unit}.gn", 256, running=False)
    for name, out in (("conv_cls", 80), ("conv_reg", 4), ("conv_centerness", 1)):
        yield from convolution(f"bbox_head.{name}", out, 256, 3, bias=True)
    yield from ((f"bbox_head.scales.{level}.scale", ()) for level in range(5))


def cascade_layout(channels: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for level in range(4):
        yield from convolution(f"neck.lateral_convs.{level}.conv", 256, channels[level], 1, bias=True)
        yield from convolution(f"neck.fpn_convs.{level}.conv", 256, 256, 3, bias=True)
    for name, out, kernel in (("rpn_conv", 256, 3), ("rpn_cls", 3, 1), ("rpn_reg", 12, 1)):
        yield from convolution(f"rpn_head.{name}", out, 256, kernel, bias=True)
    for stage in range(3):
        box, mask = f"roi_head.bbox_head.{stage}", f"roi_head.mask_head.{stage}"
        for unit in range(4):
            yield from convolution(f"{box}.shared_convs.{unit}.conv", 256, 256, 3, bias=False)
            yield from norm(f"{box}.shared_convs.{unit}.bn", 256)
            yield from convolution(f"{mask}.convs.{unit}.conv", 256, 256, 3, bias=True)
        for name, shape in (("shared_fcs.0", (1024, 256 * 49)), ("fc_cls", (81, 1024)), ("fc_reg", (320, 1024))):
            yield f"{box}.{name}.weight", shape
            yield f"{box}.{name}.bias", shape[:1]
        yield from convolution(f"{mask}.upsample", 256, 256, 2, bias=True)
        yield from convolution(f"{mask}.conv_logits", 80, 256, 1, bias=True)


def state_of(name: str) -> dict[str, torch.Tensor]:
    """A whole state dict of MMDetection 2.x: constants, one per key, without memory of their own."""
    entry = WEIGHTS[name]
    head = fcos_layout if entry.method == "FCOS" else cascade_layout
    layout = {f"backbone.{k}": v for k, v in backbone_layout(entry.model, norm_features=entry.model == "replknet_xl")}
    layout |= dict(head(ARCHITECTURES[entry.model]["channels"]))
    return {
        key: torch.tensor(7) if key.endswith("tracked") else torch.tensor(1 + i / 4096).expand(shape)
        for i, (key, shape) in enumerate(layout.items())
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFICIAL)
def test_files_of_the_release_load_strictly(name, tmp_path):
    state = state_of(name)
    path = tmp_path / WEIGHTS[name].sources[0].file_name
    # As MMDetection 2.x writes it.
    torch.save(
        {"meta": {"CLASSES": tuple(f"class {i}" for i in range(80)), "mmdet_version": "2.20.0"}, "state_dict": state},
        path,
    )
    entry = official_detector(path)
    assert entry is WEIGHTS[name]
    detector = build_detector(official_config(entry))
    report = load_weights(detector, path)
    assert report.is_exact
    assert len(report.matched) == len(state)
    for key, value in detector.state_dict().items():
        assert torch.equal(value, state[key].to(value.dtype)), key
    for key in ("neck.fpn_convs.0.conv.bias", "backbone.stages.2.blocks.34.pw1.conv.weight"):
        spoiled = {k: v for k, v in state.items() if k != key}
        torch.save({"state_dict": spoiled}, path)
        with pytest.raises(RunError, match=f"1 missing .{key}"):
            load_weights(detector, path)
    torch.save({"state_dict": {**state, "bbox_head.more": torch.zeros(1)}}, path)
    with pytest.raises(RunError, match=r"1 unexpected .bbox_head.more"):
        load_weights(detector, path)


FCOS, XL = "replknet_31b.in1k_fcos_coco", "replknet_xl.meg73m_cascade_mask_rcnn_coco"
# Parameters, multiply-adds and FLOPs counted with the re-parameterised backbone.
COSTS = {
    FCOS: (86_692_314, 432_557_140_480, 433_620_393_530),
    "replknet_31b.in1k_cascade_mask_rcnn_coco": (136_595_762, 963_540_464_640, 964_939_902_900),
    "replknet_31b.in22k_cascade_mask_rcnn_coco": (136_595_762, 963_540_464_640, 964_939_902_900),
    "replknet_31l.in22k_cascade_mask_rcnn_coco": (228_898_674, 1_318_772_720_640, 1_320_631_934_900),
    XL: (391_792_818, 1_941_438_960_640, 1_944_011_902_900),
}


def count(config: Config) -> Complexity:
    """Of the re-parameterised detector at the size of the published table."""
    with torch.device("meta"):
        return complexity(FixedCost(prepare_for_inference(build_detector(config))), (3, 800, 1280))


def rounded(counted: Complexity) -> tuple[int, int]:
    """Millions of parameters and 1e9 FLOPs, as the table prints them."""
    return round(counted.params / 1e6), round(counted.mmcv_flops / 1e9)


@pytest.mark.parametrize("name", OFFICIAL)
def test_costs_are_the_published_ones(name):
    """But for FCOS, and for XL's FLOPs, which are those of B's and L's kernels; the released XL has 27-27-27-13."""
    counted = count(official_config(WEIGHTS[name]))
    assert (counted.params, counted.macs, counted.mmcv_flops) == COSTS[name]
    assert WEIGHTS[name].published_cost is not None
    *published, size = WEIGHTS[name].published_cost
    assert size == (800, 1280)
    if name == FCOS:
        assert rounded(counted) == (published[0], 434)
    elif name == XL:
        assert rounded(counted) == (published[0], 1944)
        other = official_config(WEIGHTS[XL])
        other.model.backbone.kernel_sizes = (31, 29, 27, 13)
        assert rounded(count(other)) == tuple(published)
    else:
        assert rounded(counted) == tuple(published)


# Ding et al. 2022, table 9, ResNeXt-101-64x4d beside RepLKNet.
@pytest.mark.parametrize(
    ("name", "published"), [(FCOS, (90, 439)), ("replknet_31b.in1k_cascade_mask_rcnn_coco", (140, 972))]
)
def test_costs_of_the_published_baselines(name, published):
    """Another backbone in the same heads, its batch norms neither folded nor synchronised."""
    config = official_config(WEIGHTS[name])
    backbone = {"type": "ResNeXt", "depth": 101, "groups": 64, "base_width": 4, "norm_cfg": {"type": "BN"}}
    config.merge_from_dict({"model.backbone": {"_delete_": True, **backbone}})
    config.model.neck.in_channels = [256, 512, 1024, 2048]
    assert rounded(count(config)) == published


@pytest.mark.parametrize("method", ["fcos", "cascade_mask_rcnn"])
def test_every_layer_is_counted_once_a_use(small_detector, method):
    """What the test mode runs is what is counted, but for the number of regions."""
    detector = small_detector(method)
    cost = complexity(FixedCost(detector), (3, 64, 96))
    ran: set[str] = set()
    for name, module in detector.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            module.register_forward_hook(lambda *_, name=name: ran.add(name))
    FixedCost(detector)(torch.zeros(1, 3, 64, 96))
    expected = {n for n, m in detector.named_modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))}
    assert ran == expected
    assert cost.params == sum(p.numel() for p in detector.parameters())


def found_in(detector: nn.Module, config, picture: np.ndarray, **options):
    opened = open_with(detector, config, **options)
    return opened.detect(picture)


def open_with(detector: nn.Module, config, precision="fp32"):
    """An opened detector around weights that are in memory."""
    config = copy.deepcopy(config)
    opened = open_detector(config=config, merged=False, precision=precision)
    opened.model.load_state_dict(detector.state_dict())
    return opened


def low_threshold(config):
    """So that untrained heads find something."""
    target = config.model.test_cfg
    target = target.rcnn if "rcnn" in target else target
    target.score_thr = 0.0
    return config


@pytest.fixture(params=["fcos", "cascade_mask_rcnn"])
def method(request) -> str:
    return request.param


@pytest.fixture
def picture() -> np.ndarray:
    from sklearn.datasets import load_sample_images

    return np.ascontiguousarray(load_sample_images().images[0][:200, :300])


def test_merging_changes_nothing_but_rounding(small_config, small_detector, trained, picture, method):
    config = low_threshold(copy.deepcopy(small_config(method)))
    detector = small_detector(method)
    trained(detector.backbone)
    opened = open_with(detector, config)
    before = opened.detect(picture)
    replknet.reparameterize(opened.model.backbone)
    assert opened.model.backbone.form == "fused"
    after = opened.detect(picture)
    assert len(before) == len(after) > 10
    # Scores of an untrained head are close to each other: compare sets of boxes by their score.
    assert np.allclose(before.scores, after.scores, atol=1e-5)
    same = (before.labels == after.labels).mean()
    assert same > 0.95
    agree = before.labels == after.labels
    assert np.median(np.abs(before.boxes[agree] - after.boxes[agree])) < 1e-3
    maps = [
        model.extract_feat(torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(0)))
        for model in (trained(small_detector(method)), prepare_for_inference(trained(small_detector(method))))
    ]
    for one, other in zip(*maps, strict=True):
        assert (one - other).abs().max() <= 1e-4 * one.abs().max()


@pytest.mark.parametrize("size", [(33, 47), (1, 1), (7, 500), (480, 640)])
def test_any_input_size(small_config, small_detector, method, size):
    config = low_threshold(copy.deepcopy(small_config(method)))
    resize_test(config, 96)
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    found = open_with(small_detector(method), config).detect(pixels)
    height, width = size
    assert found.size == (width, height)
    assert (found.boxes >= 0).all()
    assert (found.boxes[:, 0::2] <= width + 1e-3).all()
    assert (found.boxes[:, 1::2] <= height + 1e-3).all()
    assert (found.masks is not None) == (method == "cascade_mask_rcnn")
    if found.masks is not None:
        assert found.masks.shape == (len(found), height, width)


def test_boxes_in_bfloat16_stay_sharp(small_config, small_detector, picture, method):
    config = low_threshold(copy.deepcopy(small_config(method)))
    detector = small_detector(method)
    opened = open_with(detector, config, precision="bf16")
    seen: dict[str, set[torch.dtype]] = {"convolutions": set(), "dense head": set(), "regions": set()}

    def note(kind: str, *tensors: torch.Tensor) -> None:
        seen[kind] |= {tensor.dtype for tensor in tensors}

    dense = opened.model.rpn_head if method != "fcos" else opened.model.bbox_head
    dense.register_forward_hook(lambda _m, _i, out: note("dense head", *(t for level in out for t in level)))
    for module in opened.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _m, _i, out: note("convolutions", out))
        elif type(module).__name__ == "RoIAlign":
            module.register_forward_hook(lambda _m, inputs, _o: note("regions", *inputs))
    sharp, exact = opened.detect(picture), open_with(detector, config).detect(picture)
    assert seen["convolutions"] == {torch.bfloat16}
    assert seen["dense head"] == {torch.float32}
    assert seen["regions"] <= {torch.float32}
    assert sharp.scores.dtype == np.float32
    assert np.abs(sharp.scores - exact.scores).max() < 0.02


def test_why_boxes_need_float32(small_detector):
    """mmdet makes points in the dtype of the scores: in bfloat16 those beyond 256 pixels move by up to 4."""
    head = small_detector("fcos").bbox_head
    points = {
        dtype: head.prior_generator.single_level_grid_priors((100, 168), 0, dtype=dtype, device="cpu").float()
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert (points[torch.bfloat16] - points[torch.float32]).abs().max() == 4


def test_checkpointing_gives_the_same_gradients(small_detector, method):
    gradients = []
    for checkpointing in (False, True):
        detector = small_detector(method, grad_checkpointing=checkpointing).train()
        sum(losses_of(detector, method != "fcos").values()).backward()
        gradients.append({name: p.grad for name, p in detector.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_picture_without_objects_can_be_learned(small_detector, method):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    detector = small_detector(method).train()
    sample = DetDataSample(
        metainfo={"img_shape": (64, 64), "ori_shape": (64, 64), "scale_factor": (1.0, 1.0), "img_id": 1}
    )
    sample.gt_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    sample.gt_instances.masks = BitmapMasks(np.zeros((0, 64, 64), np.uint8), 64, 64)
    batch = detector.data_preprocessor(
        {"inputs": [torch.full((3, 64, 64), 99, dtype=torch.uint8)], "data_samples": [sample]}, True
    )
    losses = detector(**batch, mode="loss")
    total = sum(sum(v) if isinstance(v, list) else v for k, v in losses.items() if "loss" in k)
    total.backward()
    assert torch.isfinite(total)
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)


def test_classes_of_heads(small_config, method):
    config = copy.deepcopy(small_config(method))
    set_classes(config, 3)
    with torch.device("meta"):
        state = build_detector(config).state_dict()
    if method == "fcos":
        assert state["bbox_head.conv_cls.weight"].shape[0] == 3
    else:
        for stage in range(3):
            assert state[f"roi_head.bbox_head.{stage}.fc_cls.weight"].shape[0] == 4
            assert state[f"roi_head.bbox_head.{stage}.fc_reg.weight"].shape[0] == 12
            assert state[f"roi_head.mask_head.{stage}.conv_logits.weight"].shape[0] == 3


def test_cocos_own_ids():
    assert len(COCO_CATEGORY_IDS) == 80
    assert (COCO_CATEGORY_IDS[0], COCO_CATEGORY_IDS[-1]) == (1, 90)
    # hair drier, the last but one; between it and toothbrush nothing was dropped.
    assert COCO_CATEGORY_IDS[-2] == 89
    config = official_config(WEIGHTS[OFFICIAL[0]])
    assert dict(zip(config.metainfo.classes, config.metainfo.category_ids, strict=True))["stop sign"] == 13


def test_what_cannot_be_opened(small_config, tmp_path):
    with pytest.raises(UsageError, match="give --weights"):
        open_detector()
    with pytest.raises(UsageError, match="neither a file nor the name"):
        open_detector("no_such.pth")
    with pytest.raises(UsageError, match=r"are weights for segmentation; for detection there are replknet_31b.in1k"):
        open_detector("replknet_31b.in1k_upernet_ade20k")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "some.pth")
    with pytest.raises(UsageError, match=r"does not hold its config"):
        open_detector(tmp_path / "some.pth")
    with pytest.raises(RunError, match="does not fit"):
        open_detector(tmp_path / "some.pth", config=copy.deepcopy(small_config("fcos")))
    with pytest.raises(UsageError, match=r"give a short side of 32"):
        open_detector(config=copy.deepcopy(small_config("fcos")), image_size=8)


def test_recipes_are_mmdets_own_configs(small_config, method):
    """Built by MMDetection itself, without anything of this package around it but the registered backbone."""
    with torch.device("meta"), detection_scope():
        assert type(MODELS.build(small_config(method).model)).__module__.startswith("mmdet.")
