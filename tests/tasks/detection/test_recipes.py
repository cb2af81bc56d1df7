"""Recipes: the release's numbers, its mistakes mended, and the same detectors as those behind official names."""

import re

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS
from torch import nn

from replknet.models.weights import WEIGHTS
from replknet.tasks.detection.detector import build_detector
from replknet.tasks.detection.official import official_config
from replknet.tasks.openmmlab.configs import read_config

from .conftest import RECIPES

# Published weights, drop path, lr, epochs, steps, warm-up factor, pictures a GPU, clip, mean of red, backbone weights.
OFFICIAL = {
    "replknet_31b_1k_fcos_2x": (
        "replknet_31b.in1k_fcos_coco",
        (0.5, 2e-4, 24, [16, 22], 1 / 3, 2, 35, 123.675, "replknet_31b.in1k_224"),
    ),
    "replknet_31b_1k_cascade_mask_rcnn_3x": (
        "replknet_31b.in1k_cascade_mask_rcnn_coco",
        (0.6, 4e-4, 36, [27, 33], 0.001, 1, None, 123.675, "replknet_31b.in1k_224"),
    ),
    "replknet_31b_22k_cascade_mask_rcnn_3x": (
        "replknet_31b.in22k_cascade_mask_rcnn_coco",
        (0.4, 4e-4, 36, [27, 33], 0.001, 1, None, 123.675, "replknet_31b.in22k"),
    ),
    "replknet_31l_22k_cascade_mask_rcnn_3x": (
        "replknet_31l.in22k_cascade_mask_rcnn_coco",
        (0.7, 4e-4, 36, [27, 33], 0.001, 1, None, 123.675, "replknet_31l.in22k"),
    ),
    "replknet_xl_73m_cascade_mask_rcnn_3x": (
        "replknet_xl.meg73m_cascade_mask_rcnn_coco",
        (0.5, 4e-4, 36, [27, 33], 0.001, 4, None, 127.5, "replknet_xl.meg73m"),
    ),
}
NAMES = sorted(path.stem for path in RECIPES.glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_whole(name):
    text = (RECIPES / f"{name}.py").read_text()
    for label in ("Source", "Command", "Hardware", "Published score", "Status"):
        assert re.search(rf"^# {label}: +\S", text, re.MULTILINE), label
    assert f"--config recipes/detection/{name}.py" in text
    assert "momentum" not in read_config(RECIPES / f"{name}.py").optim_wrapper.optimizer


def test_every_official_detector_has_a_recipe():
    assert set(OFFICIAL) <= set(NAMES)
    assert {weights for weights, _ in OFFICIAL.values()} == {w for w, e in WEIGHTS.items() if e.task == "detection"}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_numbers(name):
    config = read_config(RECIPES / f"{name}.py")
    weights, (drop_path, lr, epochs, steps, factor, batch, clip, red, backbone) = OFFICIAL[name]
    model, optimizer, warmup, decay = config.model, config.optim_wrapper.optimizer, *config.param_scheduler
    assert (model.backbone.drop_path_rate, model.backbone.init_cfg.checkpoint) == (drop_path, backbone)
    assert (model.backbone.norm_cfg.type, model.backbone.grad_checkpointing) == ("SyncBN", True)
    assert dict(optimizer) == {"type": "AdamW", "lr": lr, "betas": (0.9, 0.999), "weight_decay": 0.05}
    assert dict(config.optim_wrapper.paramwise_cfg) == {"norm_decay_mult": 0.0}
    assert (config.optim_wrapper.get("clip_grad") or {}).get("max_norm") == clip
    assert (config.train_cfg.max_epochs, decay.milestones, decay.gamma) == (epochs, steps, 0.1)
    assert warmup.get("factor", warmup.get("start_factor")) == factor
    assert config.train_dataloader.batch_size == batch
    assert config.val_evaluator.metric == (["bbox"] if model.type == "FCOS" else ["bbox", "segm"])
    # One preprocessor serves training, validation and test: the release's XL validated with ImageNet's mean.
    assert model.data_preprocessor.mean[0] == red
    assert (red == 127.5) == bool(model.backbone.get("norm_features"))
    pipelines = [config.val_dataloader.dataset.pipeline, config.test_dataloader.dataset.pipeline]
    pipelines.append(config.train_dataloader.dataset.pipeline)
    assert not any("Normalize" in step["type"] for pipeline in pipelines for step in pipeline)
    assert [step["type"] for step in pipelines[0]] == ["LoadPicture", "Resize", "PackDetInputs"]
    official = official_config(WEIGHTS[weights])
    ours = model.to_dict()
    for key in ("drop_path_rate", "grad_checkpointing", "init_cfg"):
        ours["backbone"].pop(key)
    assert ours == official.model.to_dict()
    assert pipelines[0][1] == official.test_pipeline[1]


def rates(config, steps: int, epoch: int) -> list[float]:
    """Learning rate of every step, `epoch` steps an epoch."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=config.optim_wrapper.optimizer.lr)
    schedulers = []
    for entry in config.param_scheduler:
        options = {key: value for key, value in entry.items() if key not in ("type", "by_epoch")}
        if entry.by_epoch:
            options["milestones"] = [milestone * epoch for milestone in entry.milestones]
            options["end"] = entry.end * epoch
        schedulers.append(PARAM_SCHEDULERS.get(entry.type)(optimizer, **options, by_epoch=False))
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return found


def test_the_releases_learning_rates():
    """mmcv 1.x: warm-up to 500 iterations, by a constant third or linearly from a thousandth; a tenth at two epochs."""
    epoch = 100
    fcos = rates(read_config(RECIPES / "replknet_31b_1k_fcos_2x.py"), 24 * epoch, epoch)
    for step in (0, 1, 250, 499, 500, 501, 1599, 1600, 2199, 2200, 2399):
        drops = (step >= 16 * epoch) + (step >= 22 * epoch)
        assert fcos[step] == pytest.approx(2e-4 * 0.1**drops * (1 / 3 if step < 500 else 1)), step
    cascade = rates(read_config(RECIPES / "replknet_31b_1k_cascade_mask_rcnn_3x.py"), 36 * epoch, epoch)
    for step in (0, 1, 250, 499, 500, 501, 2699, 2700, 3299, 3300, 3599):
        drops = (step >= 27 * epoch) + (step >= 33 * epoch)
        warm = 1 - (1 - step / 500) * (1 - 0.001) if step < 500 else 1
        assert cascade[step] == pytest.approx(4e-4 * 0.1**drops * warm), step


@pytest.mark.parametrize("name", ["replknet_31b_1k_fcos_2x", "replknet_tiny_cascade_mask_rcnn"])
def test_norms_alone_have_no_weight_decay(name):
    config = read_config(RECIPES / f"{name}.py")
    with torch.device("meta"):
        model = build_detector(config)
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    decayed = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    norms = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
    of_norms = {id(p) for m in model.modules() if isinstance(m, norms) for p in m.parameters()}
    assert of_norms
    assert all(decayed[id(p)] == (0.0 if id(p) in of_norms else 0.05) for p in model.parameters())


def test_training_pictures_of_cascade():
    """Short sides of 480 to 800; for the other half a crop of 384 x 600 from 400 to 600 first, as in DETR."""
    load, annotations, flip, choice, pack = read_config(
        RECIPES / "replknet_31b_22k_cascade_mask_rcnn_3x.py"
    ).train_dataloader.dataset.pipeline
    assert [step.type for step in (load, annotations, flip, pack)] == [
        "LoadPicture",
        "LoadAnnotations",
        "RandomFlip",
        "PackDetInputs",
    ]
    assert flip.prob == 0.5
    (plain,), (first, crop, second) = choice.transforms
    assert plain == second
    assert plain.scales == [(side, 1333) for side in range(480, 801, 32)]
    assert first.scales == [(400, 1333), (500, 1333), (600, 1333)]
    assert (crop.crop_type, tuple(crop.crop_size), crop.allow_negative_crop) == ("absolute_range", (384, 600), True)


def test_training_pictures_of_fcos():
    steps = read_config(RECIPES / "replknet_31b_1k_fcos_2x.py").train_dataloader.dataset.pipeline
    assert [step.type for step in steps][2:4] == ["RandomChoiceResize", "RandomFlip"]
    assert steps[2].scales == [(1333, 640), (1333, 800)]
    assert steps[1].get("with_mask", False) is False
