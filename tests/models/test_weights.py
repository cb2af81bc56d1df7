import re

import pytest
from timm.models import PretrainedCfg

from replknet._errors import UsageError
from replknet.models.weights import WEIGHTS, find_weights, timm_default_cfgs, weights_of

CLASSIFICATION = [
    "replknet_31b.in1k_224",
    "replknet_31b.in1k_384",
    "replknet_31b.in22k",
    "replknet_31b.in22k_ft_in1k_224",
    "replknet_31b.in22k_ft_in1k_384",
    "replknet_31b.in1k_120e",
    "replknet_13.in1k_120e",
    "replknet_31l.in22k",
    "replknet_31l.in22k_ft_in1k_384",
    "replknet_xl.meg73m",
    "replknet_xl.meg73m_ft_in1k_320",
]


def test_the_release_is_complete():
    assert sorted(timm_default_cfgs()) == sorted(CLASSIFICATION)
    tasks = [entry.task for entry in WEIGHTS.values()]
    assert (tasks.count("segmentation"), tasks.count("detection")) == (5, 5)


def test_every_file_has_its_own_name_and_place():
    sources = [source for entry in WEIGHTS.values() for source in entry.sources]
    assert len({source.url for source in sources}) == len({source.file_name for source in sources}) == len(sources)
    assert all(source.url.startswith("https://") for source in sources)


def test_mirrors_come_first_and_carry_their_hash():
    mirrors = [source for entry in WEIGHTS.values() for source in entry.sources if "openmmlab" in source.url]
    assert len(mirrors) == 6
    for source in mirrors:
        assert re.fullmatch(r"[0-9a-f]{8}", source.sha256_prefix or "")
        assert source.file_name.endswith(f"-{source.sha256_prefix}.pth")
    assert all(entry.sources[0] in mirrors for entry in WEIGHTS.values() if len(entry.sources) > 1)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_timm_takes_the_configuration(name):
    entry, cfg = WEIGHTS[name], PretrainedCfg(**timm_default_cfgs()[name])
    assert cfg.has_weights
    assert cfg.input_size == entry.input_size
    assert cfg.num_classes == (1000 if entry.trained_on[-1] == "ImageNet-1K" else 21841)
    assert (cfg.crop_mode, cfg.crop_pct) == (("squash", 1.0) if entry.input_size[1] >= 384 else ("center", 0.875))
    assert cfg.mean == ((0.5, 0.5, 0.5) if entry.model == "replknet_xl" else (0.485, 0.456, 0.406))


def test_a_bare_model_means_its_default():
    assert find_weights("replknet_31b").tag == "in1k_224"
    assert [entry.tag for entry in weights_of("replknet_xl")] == ["meg73m_ft_in1k_320", "meg73m"]


@pytest.mark.parametrize("name", ["replknet_31b.in1k_225", "replknet_31", "", "resnet50"])
def test_unknown_names_are_refused(name):
    with pytest.raises(UsageError, match=r"no official weights are called"):
        find_weights(name)


def test_near_names_are_offered():
    with pytest.raises(UsageError, match=r"replknet_31b\.in1k_384"):
        find_weights("replknet_31b.in1k384")
