from types import SimpleNamespace
from typing import Any

import pytest

from replknet.data.class_names import class_names, imagenet_class_names


def model(num_classes: int, **cfg) -> Any:
    return SimpleNamespace(num_classes=num_classes, pretrained_cfg=cfg)


@pytest.mark.parametrize(
    ("count", "index", "words"),
    [
        (1000, 0, "tench"),
        (1000, 386, "African elephant"),
        (1000, 999, "toilet tissue"),
        (21841, 3674, "African elephant"),
        (21841, 0, "organism"),
    ],
)
def test_imagenet(count, index, words):
    names = class_names(model(count))
    assert len(names) == count
    assert names[index].startswith(words)


def test_own_names_win():
    assert class_names(model(2, label_names=["a", "b"])) == ["a", "b"]
    assert class_names(model(2, label_names=("n1", "n2"), label_descriptions={"n1": "one"})) == ["one", "n2"]
    assert class_names(model(3, label_names={"0": "a", "2": "c"})) == ["a", "1", "c"]


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"], [], None])
def test_names_that_do_not_fit_are_not_used(names):
    assert class_names(model(2, label_names=names)) == ["0", "1"]


def test_a_bare_module_has_no_names():
    assert class_names(SimpleNamespace()) == []  # type: ignore[arg-type]
    assert imagenet_class_names(10) is None
