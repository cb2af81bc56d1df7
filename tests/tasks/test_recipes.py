"""Every recipe is read as `replknet train --config` reads it, and its arithmetic is the published one."""

import math
import re
from pathlib import Path

import pytest
import timm
import torch
from jsonargparse import ArgumentParser
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing

import replknet  # noqa: F401 - registers the models
from replknet.cli import train as train_command
from replknet.data import ImageFormat, training_transform
from replknet.tasks.batching import plan_batch
from replknet.tasks.parameter_groups import parameter_groups

FOLDER = Path(__file__).parents[2] / "recipes" / "classification"
RECIPES = sorted(FOLDER.glob("*.yaml"))

# global batch, lr, min lr, epochs, warm-up, weight decay, drop path, layer decay, mixing, EMA, size, classes, devices
OFFICIAL = {
    "replknet_31b_1k_224": (2048, 4e-3, 1e-6, 300, 10, 0.05, 0.5, 1.0, True, True, 224, None, 32),
    "replknet_31b_1k_384": (1024, 4e-4, 1e-6, 30, 1, 1e-8, 0.8, 0.7, False, True, 384, None, 32),
    "replknet_31b_22k_224": (4096, 4e-3, 1e-6, 90, 5, 0.05, 0.1, 1.0, True, False, 224, 21841, 128),
    "replknet_31l_22k_224": (4096, 4e-3, 1e-6, 90, 5, 0.05, 0.1, 1.0, True, False, 224, 21841, 128),
    "replknet_31b_22k_to_1k_224": (512, 4e-4, 1e-6, 30, 1, 1e-8, 0.2, 0.7, False, True, 224, None, 16),
    "replknet_31b_22k_to_1k_384": (512, 4e-4, 3e-4, 30, 1, 1e-8, 0.3, 0.7, False, True, 384, None, 32),
    "replknet_31l_22k_to_1k_384": (512, 4e-4, 3e-4, 30, 1, 1e-8, 0.3, 0.7, False, True, 384, None, 32),
}


def read(path: Path, *arguments: str):
    parser = ArgumentParser()
    train_command.add_arguments(parser)
    return train_command.config_from(parser.parse_args(["--config", str(path), "--data", "digits", *arguments]))


def drop_paths(model) -> list[float]:
    """Rates in order of depth; a block without drop path has rate 0."""
    return [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_whole(path):
    text = path.read_text()
    for label in ("Source", "One machine", "Hardware", "Published score", "Status"):
        assert re.search(rf"^# {label}: +\S", text, re.MULTILINE), label
    assert re.search(r"^# Status: +(run|not run)\b", text, re.MULTILINE)
    config = read(path)
    with torch.device("meta"):
        model = timm.create_model(config.model, drop_path_rate=config.drop_path, **config.model_kwargs)
    # Both blocks of a layer share a rate that rises linearly with depth.
    rates = drop_paths(model)
    layers = len(rates) // 2
    expected = [config.drop_path * layer / (layers - 1) for layer in range(layers) for _ in range(2)]
    assert rates == pytest.approx(expected, abs=1e-6)
    groups = parameter_groups(model, weight_decay=config.weight_decay, layer_decay=config.layer_decay)
    assert {group["weight_decay"] for group in groups} == {0.0, config.weight_decay}
    steps = 1281167 // config.global_batch
    lr = config.optimization(steps).lr
    assert lr(0) == 0.0
    assert lr(int(config.warmup_epochs * steps)) == config.lr
    halfway = (config.warmup_epochs + config.epochs) * steps // 2
    progress = (halfway - config.warmup_epochs * steps) / ((config.epochs - config.warmup_epochs) * steps)
    assert lr(int(halfway)) == pytest.approx(
        config.min_lr + (config.lr - config.min_lr) * math.cos(math.pi * progress / 2) ** 2, rel=1e-3
    )
    plan_batch(config.global_batch, 1, max_per_device=config.max_batch_per_device, even=config.mixing.mixes)


def test_every_official_recipe_is_there():
    assert set(OFFICIAL) <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_numbers(name):
    config = read(FOLDER / f"{name}.yaml")
    batch, lr, min_lr, epochs, warmup, decay, drop_path, layer_decay, mixes, ema, size, classes, devices = OFFICIAL[
        name
    ]
    assert config.model.split(".")[0] == name[:12]
    assert (config.global_batch, config.lr, config.min_lr) == (batch, lr, min_lr)
    assert (config.epochs, config.warmup_epochs, config.weight_decay) == (epochs, warmup, decay)
    assert (config.drop_path, config.layer_decay, config.image_size) == (drop_path, layer_decay, size)
    assert (config.mixup, config.cutmix) == ((0.8, 1.0) if mixes else (0.0, 0.0))
    assert (config.mixup_prob, config.mixup_switch_prob, config.mixup_mode) == (1.0, 0.5, "batch")
    assert config.ema_decay == (0.9999 if ema else 0.0)
    assert config.validate is (classes is None)
    assert config.num_classes == classes
    assert config.label_smoothing == 0.1
    assert (config.betas, config.eps, config.clip_grad) == ((0.9, 0.999), 1e-8, None)
    assert config.hardware.precision == "fp32"
    # The release's commands: so many GPUs, no accumulation.
    plan = plan_batch(batch, devices, max_per_device=config.max_batch_per_device, even=mixes)
    assert plan.accumulation == 1
    assert config.pretrained is ("." in config.model)


def test_the_releases_augmentation():
    config = read(FOLDER / "replknet_31b_1k_224.yaml")
    assert config.augmentation is not None
    steps = training_transform(ImageFormat(), config.augmentation).transforms  # type: ignore[attr-defined]
    crop, randaugment, erasing = steps[0], *(s for s in steps if isinstance(s, (RandAugment, RandomErasing)))
    assert (crop.scale, crop.size) == ((0.08, 1.0), (224, 224))
    assert "bicubic" in str(crop).lower()
    assert len(randaugment.ops) == 15
    assert randaugment.num_layers == 2
    assert {op.magnitude for op in randaugment.ops} == {9.0}
    assert {op.magnitude_std for op in randaugment.ops} == {0.5}
    assert "PosterizeIncreasing" in {op.name for op in randaugment.ops}
    assert (erasing.probability, erasing.rand_color, erasing.per_pixel) == (0.25, False, True)
    assert (erasing.min_count, erasing.max_count) == (1, 1)


def test_options_to_the_right_and_the_positional_model_win():
    parser = ArgumentParser()
    train_command.add_arguments(parser)
    path = str(FOLDER / "replknet_31b_1k_224.yaml")
    arguments = ["replknet_tiny", "--config", path, "--data", "digits", "--lr", "1e-3", "--augmentation.erasing", "0.1"]
    config = train_command.config_from(parser.parse_args(arguments))
    assert (config.model, config.lr, config.epochs) == ("replknet_tiny", 1e-3, 300)
    assert config.augmentation is not None
    assert config.augmentation.erasing == 0.1
    assert config.augmentation.auto_augment == "rand-m9-mstd0.5-inc1"
