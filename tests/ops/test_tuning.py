import json
import logging

import pytest
import torch

from replknet.ops import _decided, _tuning, autotune, depthwise_conv2d, explain
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
