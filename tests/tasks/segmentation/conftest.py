"""Crops of imgviz's two annotated pictures as a data set, and a config that a CPU trains in a minute."""

import os
import subprocess
import sys
from pathlib import Path

import imgviz
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "recipes" / "segmentation"

CONFIG = """
_base_ = ['{recipes}/replknet_tiny_upernet_folder.py']
load = [dict(type='LoadImageFromFile'), dict(type='LoadCheckedAnnotations')]
train_pipeline = load + [dict(type='RandomFlip', prob=0.5), dict(type='PackSegInputs')]
test_pipeline = load + [dict(type='PackSegInputs')]
train_dataloader = dict(
    batch_size=6, num_workers=0, persistent_workers=False, dataset=dict(data_root='{data}', pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(data_root='{data}', pipeline=test_pipeline))
test_dataloader = val_dataloader
model = dict(
    data_preprocessor=dict(size=(96, 96)),
    backbone=dict(model='replknet_nano', drop_path_rate=0.0),
    decode_head=dict(in_channels=[24, 48, 96, 192], channels=32, dropout_ratio=0.0),
    auxiliary_head=dict(in_channels=96, channels=32, dropout_ratio=0.0))
optim_wrapper = dict(optimizer=dict(lr=5e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=21, by_epoch=False),
    dict(type='PolyLR', power=1.0, eta_min=0.0, begin=0, end={iterations} + 1, by_epoch=False)]
default_hooks = dict(checkpoint=dict(interval={every}, max_keep_ckpts=-1, save_best=None))
train_cfg = dict(max_iters={iterations}, val_interval={iterations})
"""


@pytest.fixture(scope="session")
def crops(tmp_path_factory) -> Path:
    """Six 96x96 crops of imgviz's VOC and ARC2017 pictures at half size, 10 classes, under images/ and labels/.

    Objects of fewer than 300 pixels, of which a crop shows a corner only, are ignored (255).
    """
    root, names, found = tmp_path_factory.mktemp("crops"), [], []
    for source in ("voc", "arc2017"):
        example = getattr(imgviz.data, source)()
        class_names = [name.strip("_") for name in example["class_names"]]
        height, width = (side // 2 for side in example["class_label"].shape)
        labels = example["class_label"][1::2, 1::2][:height, :width]
        picture = np.asarray(Image.fromarray(example["rgb"]).resize((width, height), Image.Resampling.BOX))
        for y in range(0, height - 95, 90):
            for x in range(0, width - 95, 74):
                crop = np.asarray(class_names)[labels[y : y + 96, x : x + 96]]
                found.append((len(np.unique(crop)), f"{source}_{y}_{x}.png", picture[y : y + 96, x : x + 96], crop))
    for _, name, picture, crop in sorted(found, key=lambda item: (-item[0], item[1]))[:6]:
        labels = np.full(crop.shape, 255, np.uint8)
        for value, pixels in zip(*np.unique(crop, return_counts=True), strict=True):
            if pixels >= 300:
                names += [] if value in names else [str(value)]
                labels[crop == value] = names.index(value)
        save(root / "images" / name, picture)
        save(root / "labels" / name, labels)
    (root / "classes.txt").write_text("\n".join(names) + "\n")
    return root


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="session")
def small_config(tmp_path_factory, crops):
    """`small_config(iterations, every)`: path of a config for replknet_nano on the crops."""

    def make(iterations: int = 400, every: int = 200) -> Path:
        path = tmp_path_factory.mktemp("config") / "small.py"
        path.write_text(CONFIG.format(recipes=RECIPES, data=crops, iterations=iterations, every=every))
        return path

    return make


@pytest.fixture(scope="session")
def replknet():
    """`replknet(*words)`: the command in a process of its own with one thread; fails unless it exits with `code`."""

    def run(*words: object, code: int = 0, **options: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "replknet", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1700, env=one_thread(), **options)  # type: ignore[call-overload]
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, small_config, replknet) -> Path:
    """Output folder of 400 iterations on the crops: a nearly perfect fit, made once."""
    output = tmp_path_factory.mktemp("run") / "trained"
    done = replknet("segment", "train", "--config", small_config(), "--output", output, "--seed", "0")
    (output / "stdout.txt").write_text(done.stdout)
    return output
