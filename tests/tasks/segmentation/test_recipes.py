"""The release's arithmetic in the current form."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from replknet.models.weights import WEIGHTS
from replknet.tasks.openmmlab import require

require("segmentation")
from mmengine.registry import PARAM_SCHEDULERS  # noqa: E402
from mmseg.datasets import ADE20KDataset, CityscapesDataset  # noqa: E402

from replknet.tasks.openmmlab.configs import read_config  # noqa: E402
from replknet.tasks.segmentation.official import official_config  # noqa: E402
from replknet.tasks.segmentation.segmentor import inference_cfg  # noqa: E402

from .conftest import RECIPES  # noqa: E402

# Weights' name, GPUs, pictures a GPU, iterations, warm-up, drop path, crop, mode.
OFFICIAL = {
    "replknet_31b_1k_upernet_cityscapes_769": (
        "replknet_31b.in1k_upernet_cityscapes", 32, 2, 20000, 400, 0.5, 769, "whole",
    ),
    "replknet_31b_1k_upernet_ade20k_512": ("replknet_31b.in1k_upernet_ade20k", 64, 2, 40000, 400, 0.5, 512, "whole"),
    "replknet_31b_22k_upernet_ade20k_640": ("replknet_31b.in22k_upernet_ade20k", 64, 2, 40000, 400, 0.3, 640, "slide"),
    "replknet_31l_22k_upernet_ade20k_640": ("replknet_31l.in22k_upernet_ade20k", 64, 1, 80000, 800, 0.3, 640, "slide"),
    "replknet_xl_73m_upernet_ade20k_640": ("replknet_xl.meg73m_upernet_ade20k", 16, 2, 160000, 1500, 0.5, 640, "slide"),
}  # fmt: skip


def config_of(name: str):
    return read_config(RECIPES / f"{name}.py")


@pytest.mark.parametrize("name", OFFICIAL)
def test_batches_crops_and_modes(name):
    _, gpus, batch, iterations, _, drop_path, crop, mode = OFFICIAL[name]
    config = config_of(name)
    assert config.train_dataloader.batch_size == batch
    assert config.train_cfg.max_iters == iterations
    assert config.model.backbone.drop_path_rate == drop_path
    assert config.model.test_cfg.mode == mode
    steps = {step["type"]: step for step in config.train_dataloader.dataset.pipeline}
    assert steps["RandomCrop"].crop_size == (crop, crop) == tuple(config.model.data_preprocessor.size)
    assert steps["RandomResize"].scale == ((2049, 1025) if "cityscapes" in name else (2048, 512))
    assert steps["RandomResize"].ratio_range == (0.5, 2.0)
    if mode == "slide":
        assert (config.model.test_cfg.crop_size, config.model.test_cfg.stride) == ((640, 640), (426, 426))
    assert f"{gpus} GPUs with {batch} picture" in (RECIPES / f"{name}.py").read_text()


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_learning_rate_is_that_of_mmsegmentation_0x(name):
    _, _, _, iterations, warmup, *_ = OFFICIAL[name]
    config = config_of(name)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.optim_wrapper.optimizer.lr)
    schedulers = [PARAM_SCHEDULERS.build({**entry, "optimizer": optimizer}) for entry in config.param_scheduler]
    for step in range(2 * warmup + 100):
        regular = 2e-4 * (1 - step / iterations)
        k = (1 - step / warmup) * (1 - 1e-6) if step < warmup else 0.0
        assert optimizer.param_groups[0]["lr"] == pytest.approx(regular * (1 - k), rel=1e-6), step
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert [entry.end for entry in config.param_scheduler] == [warmup + 1, iterations + 1]


@pytest.mark.parametrize("name", OFFICIAL)
def test_adamw_without_decay_on_norms(name):
    config = config_of(name)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    found = {len(g["params"][0].shape): g["weight_decay"] for g in groups}
    assert found == {4: 0.05, 1: 0.0}
    assert [g["weight_decay"] for g in groups] == [0.05, 0.05, 0.0, 0.0]
    assert (config.optim_wrapper.optimizer.lr, config.optim_wrapper.optimizer.betas) == (2e-4, (0.9, 0.999))


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_configs_build_the_recipes_model_and_test(name):
    entry = WEIGHTS[OFFICIAL[name][0]]
    recipe, official = config_of(name), official_config(entry)
    described, made = (inference_cfg(config.model).to_dict() for config in (recipe, official))
    for key in ("drop_path_rate", "grad_checkpointing"):
        described["backbone"].pop(key)
    described["backbone"].setdefault("norm_features", False)
    described["data_preprocessor"].update(
        {k: pytest.approx(described["data_preprocessor"][k]) for k in ("mean", "std")}
    )
    assert made == described
    for key in ("test_pipeline", "tta_pipeline"):
        assert without_labels(official[key]) == without_labels(recipe[key])
    dataset = CityscapesDataset if "cityscapes" in name else ADE20KDataset
    assert official.metainfo.classes == [c.strip() for c in dataset.METAINFO["classes"]]
    assert recipe.test_dataloader.dataset.type == dataset.__name__


def without_labels(steps) -> list:
    kept = []
    for step in map(dict, steps):
        if step["type"] == "TestTimeAug":
            step["transforms"] = [without for branch in step["transforms"] if (without := without_labels(branch))]
        if "Annotations" not in step["type"]:
            kept.append({key: tuple(v) if isinstance(v, list) and key == "scale" else v for key, v in step.items()})
    return kept


def test_xl_trains_with_the_training_pipeline_and_its_own_mean():
    config = config_of("replknet_xl_73m_upernet_ade20k_640")
    assert [s["type"] for s in config.train_dataloader.dataset.pipeline][2:5] == [
        "RandomResize", "RandomCrop", "RandomFlip",
    ]  # fmt: skip
    assert config.model.data_preprocessor.mean == config.model.data_preprocessor.std == [127.5] * 3
    assert config.model.backbone.norm_features is True


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_headers(path):
    head = path.read_text().partition("_base_")[0]
    for field in ("Source:", "Command:", "Hardware:", "Published score:", "Status:"):
        assert f"# {field}" in head
    if path.stem in OFFICIAL:
        entry = WEIGHTS[OFFICIAL[path.stem][0]]
        single, multi = (f"{score.value} %" for score in entry.scores)
        assert single in head
        assert multi in head
