"""On a GPU: which operator runs, 16-bit training until objects are found again, the release's networks at full size."""

import copy
import math

import numpy as np
import pytest
import torch

from replknet import ops
from replknet.layers import DepthwiseConv2d
from replknet.models.weights import WEIGHTS
from replknet.tasks.detection.detector import build_detector, open_detector
from replknet.tasks.detection.evaluation import evaluate
from replknet.tasks.detection.official import official_config
from replknet.tasks.detection.training import DataPaths, set_schedule, train_detector
from replknet.tasks.openmmlab.runner import autocast

from .conftest import losses_of

# Height and width of the maps of 800x1280 pictures, with the kernels of 31B and 31L.
MAPS = {(200, 320): 31, (100, 160): 29, (50, 80): 27, (25, 40): 13}


def test_large_kernels_are_this_packages_layers_on_these_maps():
    with torch.device("meta"):
        detector = build_detector(official_config(WEIGHTS["replknet_31b.in1k_fcos_coco"])).eval()
    seen: dict[tuple[int, int], set[int]] = {}
    for module in detector.backbone.modules():
        if isinstance(module, DepthwiseConv2d) and module.kernel_size[0] > 5:
            module.register_forward_hook(
                lambda m, _i, out: seen.setdefault(tuple(out.shape[2:]), set()).add(m.kernel_size[0])
            )
    detector.extract_feat(torch.empty(1, 3, 800, 1280, device="meta"))
    assert seen == {size: {kernel} for size, kernel in MAPS.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("size", "kernel"), MAPS.items(), ids=str)
def test_the_fast_operator_is_used(cuda, size, kernel, dtype):
    x = torch.empty(1, 128, *size, device=cuda, dtype=dtype)
    chosen = ops.explain(x, torch.empty(128, 1, kernel, kernel, device=cuda, dtype=dtype))
    assert {chosen.forward.backend, chosen.input_grad.backend, chosen.weight_grad.backend} == {"cuda"}, str(chosen)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["replknet_31b.in1k_fcos_coco", "replknet_31b.in1k_cascade_mask_rcnn_coco"])
def test_the_releases_networks_learn_and_detect_at_full_size(cuda, name):
    config = official_config(WEIGHTS[name])
    config.model.backbone.update(grad_checkpointing=True, drop_path_rate=0.5)
    torch.manual_seed(0)
    detector = build_detector(config).to(cuda).train()
    with autocast(cuda, "bf16"):
        losses = losses_of(detector, WEIGHTS[name].method != "FCOS", (800, 1280))
    total = sum(losses.values())
    total.backward()
    assert math.isfinite(total.item())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in detector.parameters())
    del detector
    opened = open_detector(config=config, merged=True, device=cuda, precision="bf16")
    found = opened.detect(np.random.default_rng(0).integers(0, 255, (800, 1280, 3), np.uint8))
    assert found.boxes.dtype == np.float32


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["fcos", "cascade_mask_rcnn"])
def test_learning_in_bfloat16(cuda, small_config, coco_folder, tmp_path, method):
    file, folder = str(coco_folder / "all.json"), str(coco_folder)
    config = copy.deepcopy(small_config(method))
    set_schedule(config, epochs=200, warmup=10, batch_size=2, workers=0, validate_every=200)
    data = DataPaths(train_annotations=file, train_images=folder, val_annotations=file, val_images=folder)
    train_detector(config, data, output=tmp_path / "run", device="cuda", precision="bf16")
    weights = tmp_path / "run" / "epoch_200.pth"
    scores = {
        (merged, precision): evaluate(
            weights, data, merged=merged, precision=precision, workers=0, output=tmp_path / "eval", device="cuda"
        )[0]
        for merged in (False, True)
        for precision in ("fp32", "bf16")
    }
    for result in scores.values():
        assert result["bbox_AP50"] >= 0.9, scores
    assert scores[False, "fp32"]["bbox_AP"] == pytest.approx(scores[True, "fp32"]["bbox_AP"], abs=0.01)
    # The best five: scores near a threshold may fall on either side. cuDNN's convolutions are TF32's here.
    found = {
        device: open_detector(weights, device=device).detect(coco_folder / "voc.png") for device in ("cpu", "cuda")
    }
    assert np.abs(found["cpu"].scores[:5] - found["cuda"].scores[:5]).max() < 0.01
    assert np.abs(found["cpu"].boxes[:1] - found["cuda"].boxes[:1]).max() < 2
