"""Real processes, really killed: what is left resumes to the last bit."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from replknet.data import LoaderConfig

CHILD = Path(__file__).with_name("_kill_child.py")
pytestmark = pytest.mark.slow


def start(config, folder: Path, *arguments: str) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    command = [sys.executable, str(CHILD), str(folder / "config.json"), *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    # A process group of its own, so that a signal can go to the loader's workers too.
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)


def finish(config, folder: Path, *arguments: str) -> int:
    process = start(config, folder, *arguments)
    _, errors = process.communicate(timeout=300)
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode


def records(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [
        {k: v for k, v in r.items() if k not in ("train/images_per_second", "train/data_wait_share")} for r in whole
    ]


def weights(folder: Path) -> dict:
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    return checkpoint["state_dict"] | {f"ema.{key}": value for key, value in checkpoint["model_ema"].items()}


def wait_for(log: Path, lines: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not log.exists() or log.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def assert_same(one: Path, other: Path) -> None:
    assert records(one) == records(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def whole(small_config, digits_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert finish(small_config(digits_folder, folder), folder) == 0
    return folder


def test_killed_while_a_checkpoint_is_being_written(small_config, digits_folder, whole, tmp_path):
    config = small_config(digits_folder, tmp_path, resume="auto", checkpoint_every=3)
    for write in ("1", "3"):
        assert finish(config, tmp_path, write) == -signal.SIGKILL
        assert list((tmp_path / "checkpoints").glob(".*.tmp"))
    kept = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert kept["global_step"] == 6
    assert finish(config, tmp_path) == 0
    assert not list(tmp_path.rglob("*.tmp"))
    assert_same(tmp_path, whole)


def test_killed_anywhere(small_config, digits_folder, whole, tmp_path):
    config = small_config(digits_folder, tmp_path, resume="auto", checkpoint_every=2)
    log = tmp_path / "metrics.jsonl"
    for lines in (5, 15):
        process = start(config, tmp_path)
        wait_for(log, lines, process)
        process.kill()
        process.communicate()
    assert finish(config, tmp_path) == 0
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2"])
def test_a_signal_to_the_workers_too_stops_with_everything_saved(small_config, digits_folder, whole, tmp_path, name):
    """As SLURM, `timeout` and a terminal send it: to every process of the group."""
    config = small_config(digits_folder, tmp_path, resume="auto", loader=LoaderConfig(workers=2))
    process = start(config, tmp_path)
    wait_for(tmp_path / "metrics.jsonl", 5, process)
    os.killpg(process.pid, getattr(signal, name))
    _, errors = process.communicate(timeout=100)
    assert f"stopped by {name} after step" in errors
    assert finish(config, tmp_path) == 0
    assert_same(tmp_path, whole)
