import json
import logging
import time
from typing import ClassVar

import pytest
import torch

from replknet.ops import _decided, _dispatch, _library, _tuning, autotune, depthwise_conv2d, explain
from replknet.ops._dispatch import _choose
from replknet.ops._problem import Problem

PROBLEM = Problem((1, 8, 12, 12), (5, 5), torch.float32, False, torch.device("cpu"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLKNET_CACHE", str(tmp_path))
    monkeypatch.delenv("REPLKNET_AUTOTUNE", raising=False)
    _choose.cache_clear()
    _decided.clear()
    yield
    _choose.cache_clear()
    _decided.clear()


def entries(tmp_path):
    return sorted((tmp_path / "tuning").glob("*.json"))


def tensors():
    return torch.ones(1, 8, 12, 12), torch.ones(8, 1, 5, 5)


def test_nothing_is_measured_unless_asked(tmp_path):
    depthwise_conv2d(*tensors())
    assert entries(tmp_path) == []


def test_the_first_call_measures_and_later_ones_read(tmp_path, monkeypatch):
    x, w = tensors()
    with autotune():
        depthwise_conv2d(x, w)
    (entry,) = entries(tmp_path)
    content = json.loads(entry.read_text())
    assert set(content["microseconds"]) == {"rearranged", "torch"}
    assert content["key"]["x"] == [1, 8, 12, 12]
    monkeypatch.setattr(_tuning, "measure_problem", lambda *_: pytest.fail("measured twice"))
    _choose.cache_clear()
    with autotune():
        depthwise_conv2d(x, w)
    assert "measured: " in explain(x, w).forward.reason


def test_the_environment_turns_it_on(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLKNET_AUTOTUNE", "1")
    depthwise_conv2d(*tensors())
    assert len(entries(tmp_path)) == 1


def test_the_faster_one_is_chosen():
    key = _tuning.key_of("forward", PROBLEM)
    for times, expected in (
        ({"torch": 2.0, "rearranged": 1.0}, "rearranged"),
        ({"torch": 1, "rearranged": 2}, "torch"),
    ):
        _tuning.write(key, _tuning.Measurement(times))
        _choose.cache_clear()
        assert explain(*tensors()).forward.backend == expected


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": 1}', '{"microseconds": {}}', "\x00" * 50])
def test_damaged_entries_count_as_absent(damage, tmp_path, caplog):
    key = _tuning.key_of("forward", PROBLEM)
    _tuning.write(key, _tuning.Measurement({"torch": 1.0, "rearranged": 2.0}))
    (entry,) = entries(tmp_path)
    entry.write_text(damage)
    with caplog.at_level(logging.ERROR):
        assert _tuning.read(key) is None
        with autotune():
            depthwise_conv2d(*tensors())
    assert _tuning.read(key) is not None


def test_an_entry_without_times_counts_as_absent(tmp_path):
    key = _tuning.key_of("forward", PROBLEM)
    _tuning.write(key, _tuning.Measurement({}))
    assert _tuning.read(key) is None


def test_entries_of_another_key_count_as_absent(tmp_path):
    key = _tuning.key_of("forward", PROBLEM)
    _tuning.write(key, _tuning.Measurement({"torch": 1.0}))
    (entry,) = entries(tmp_path)
    content = json.loads(entry.read_text())
    content["key"]["torch"] = "0.0"
    entry.write_text(json.dumps(content))
    assert _tuning.read(key) is None


def test_a_preference_that_cannot_run_is_not_taken():
    key = _tuning.key_of("forward", PROBLEM)
    _tuning.write(key, _tuning.Measurement({"cuda": 1.0, "torch": 2.0}))
    assert explain(*tensors()).forward.backend in ("torch", "rearranged")


def test_a_folder_that_cannot_be_written_does_not_stop_the_call(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REPLKNET_CACHE", str(tmp_path / "file"))
    with autotune(), caplog.at_level(logging.WARNING):
        assert depthwise_conv2d(*tensors()).shape == (1, 8, 12, 12)
    assert "cannot be written" in caplog.text


def test_every_thing_that_matters_is_in_the_key():
    base = _tuning.key_of("forward", PROBLEM)
    others = [
        ("input_grad", PROBLEM),
        ("forward", Problem((2, 8, 12, 12), (5, 5), torch.float32, False, PROBLEM.device)),
        ("forward", Problem((1, 8, 12, 12), (5, 7), torch.float32, False, PROBLEM.device)),
        ("forward", Problem((1, 8, 12, 12), (5, 5), torch.float64, False, PROBLEM.device)),
        ("forward", Problem((1, 8, 12, 12), (5, 5), torch.float32, True, PROBLEM.device)),
    ]
    assert all(_tuning.key_of(*other) != base for other in others)
    assert {"torch", "replknet", "threads", "device"} <= set(base)


class FakeKernels:
    """A backend with three tiles on a CPU: one is fast, one is wrong, and the default is slow."""

    GIVEN: ClassVar[list] = []

    @classmethod
    def forward(cls, x, weight, bias, activation, tile=None):
        cls.GIVEN.append(tile)
        if tile is None:
            time.sleep(0.004)
        y = torch.nn.functional.conv2d(x, weight, bias, padding="same", groups=x.shape[1])
        return y * 2 if tile == "images=9" else y

    @staticmethod
    def tiles(*shapes, **about):
        return ("images=8", "images=9")

    @staticmethod
    def compile_tiles(*shapes, **about):
        pass


@pytest.fixture
def kernels(monkeypatch):
    original = _dispatch.implementation
    fake = lambda name: FakeKernels if name == "cuda" else original(name)  # noqa: E731
    monkeypatch.setattr(_dispatch, "implementation", fake)
    monkeypatch.setattr(_library, "implementation", fake)
    monkeypatch.setattr(_dispatch, "can_run_cuda", lambda pass_, problem: None)
    FakeKernels.GIVEN.clear()


def test_the_fastest_tile_is_kept_told_and_run(kernels, caplog):
    found = _tuning.measure_problem("forward", PROBLEM, ("cuda", "cuda images=8", "cuda images=9"))
    assert found is not None
    assert (found.backend, found.tile) == ("cuda", "images=8")
    assert set(found.microseconds) == {"cuda", "cuda images=8"}
    assert "cuda images=9 cannot be tuned" in caplog.text
    assert "its result differs" in caplog.text
    _tuning.write(_tuning.key_of("forward", PROBLEM), found)
    choice = _dispatch.choose("forward", PROBLEM)
    assert choice.tile == "images=8"
    assert str(choice).startswith("cuda with tile images=8 (measured: cuda images=8 ")
    FakeKernels.GIVEN.clear()
    x, w = tensors()
    _library._run(choice, "forward", x.device, x, w, None, None)
    assert FakeKernels.GIVEN == ["images=8"]


def test_autotuning_measures_backends_and_tiles(kernels, tmp_path):
    with autotune():
        assert _dispatch.choose("forward", PROBLEM).backend in ("cuda", "rearranged", "torch")
    (entry,) = entries(tmp_path)
    assert set(json.loads(entry.read_text())["microseconds"]) == {"cuda", "cuda images=8", "rearranged", "torch"}


def test_a_tile_that_is_no_longer_offered_counts_as_absent(kernels):
    key = _tuning.key_of("forward", PROBLEM)
    _tuning.write(key, _tuning.Measurement({"cuda images=4": 1.0, "cuda": 2.0}))
    assert _tuning.fastest("forward", PROBLEM, ("cuda", "torch"), measure=False) is None
    _tuning.write(key, _tuning.Measurement({"cuda images=8": 1.0, "cuda": 2.0}))
    found = _tuning.fastest("forward", PROBLEM, ("cuda", "torch"), measure=False)
    assert found is not None
    assert found.tile == "images=8"


def test_an_entry_of_backends_alone_means_the_default_tile(kernels):
    _tuning.write(_tuning.key_of("forward", PROBLEM), _tuning.Measurement({"cuda": 1.0, "torch": 2.0}))
    assert _dispatch.choose("forward", PROBLEM).tile is None


def test_no_images_are_not_measured(tmp_path):
    with autotune():
        assert depthwise_conv2d(torch.ones(0, 8, 12, 12), torch.ones(8, 1, 5, 5)).shape == (0, 8, 12, 12)
    assert entries(tmp_path) == []
