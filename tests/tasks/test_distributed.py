"""Two processes (gloo, CPU) against one with the same global batch.

Batch norm sees a process's own images only and SyncBatchNorm exists for GPUs only, so the networks compared are one
with layer norms and a RepLKNet whose batch norms keep their first statistics. Drop path and mixup, which draw for each
process, are off.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from replknet.tasks.opened_model import open_model
from replknet.tasks.trainer import Hardware

CHILD = Path(__file__).with_name("_ddp_child.py")
pytestmark = pytest.mark.slow

NETWORKS = {
    "layer norm": {"model": "test_convnext", "image_size": 32},
    "optimised": {"model": "test_convnext", "image_size": 32, "speed": "eager"},
    "frozen batch norm": {
        "model": "replknet_nano",
        "image_size": 16,
        "model_kwargs": {
            "channels": [8, 8, 16, 16],
            "layers": [1, 1, 1, 1],
            "kernel_sizes": [5, 5, 3, 3],
        },
    },
}


def launch(config, folder: Path, processes: int, *stop: str) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    values = asdict(config)
    values["strategy"] = values["hardware"]["strategy"] if processes > 1 else "auto"
    for name in ("augmentation", "loader", "hardware"):
        values.pop(name)
    (folder / "config.json").write_text(json.dumps(values))
    arguments = [str(CHILD), str(folder / "config.json"), str(folder / "reductions.json"), *stop]
    command = [sys.executable, *arguments]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        run = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
        command = [sys.executable, *run, *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=env)
    if stop:
        assert "everything is saved" in done.stderr, done.stderr[-3000:]
        return {}
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "reductions.json").read_text())


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("network", NETWORKS)
def test_two_processes_equal_one(small_config, digits_folder, tmp_path, network):
    options = {"mixup": 0.0, "cutmix": 0.0, "drop_path": None, "epochs": 2, "lr": 5e-4, "layer_decay": 0.8}
    options |= NETWORKS[network] | {"clip_grad": 1.0, "max_batch_per_device": 2}
    one = small_config(digits_folder, tmp_path / "one/run", **options)
    two = small_config(digits_folder, tmp_path / "two/run", **options)
    launch(one, tmp_path / "one", 1)
    counted = launch(two, tmp_path / "two", 2)
    # 8 images a step: 2 on each of two processes, twice. One reduction a step, not one a micro-step.
    assert counted == {"reductions": 16, "steps": 16}
    pairs = list(zip(records(tmp_path / "one/run"), records(tmp_path / "two/run"), strict=True))
    assert len(pairs) == 16 + 2
    for a, b in pairs:
        assert a["step"] == b["step"]
        for key in ("train/loss", "val/loss", "val_ema/loss", "val/top1", "val_ema/top1"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-6), (a["step"], key)


def final_state(run: Path) -> dict:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


def test_sharded_processes_equal_one_and_go_on(small_config, digits_folder, tmp_path):
    """FSDP: weights, gradients and optimizer state in two halves; checkpoints whole."""
    options = {"mixup": 0.0, "cutmix": 0.0, "drop_path": None, "epochs": 2, "lr": 5e-4, "layer_decay": 0.8}
    options |= NETWORKS["frozen batch norm"] | {"clip_grad": 1.0, "max_batch_per_device": 2, "ema_decay": 0.0}
    sharded = {**options, "hardware": Hardware(strategy="fsdp")}
    launch(small_config(digits_folder, tmp_path / "one/run", **options), tmp_path / "one", 1)
    launch(small_config(digits_folder, tmp_path / "two/run", **sharded), tmp_path / "two", 2)
    pairs = list(zip(records(tmp_path / "one/run"), records(tmp_path / "two/run"), strict=True))
    assert len(pairs) == 16 + 2
    for a, b in pairs:
        for key in ("train/loss", "val/loss", "val/top1"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-6), (a["step"], key)
    one, two = final_state(tmp_path / "one/run"), final_state(tmp_path / "two/run")
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-4, atol=1e-6, msg=name)
    # Its checkpoint is one of any run: it opens and answers.
    assert open_model(weights=tmp_path / "two/run/checkpoints/last.ckpt").outputs == 10
    # One epoch more, from the checkpoint of the first: the same as without the stop.
    half = tmp_path / "half"
    launch(small_config(digits_folder, half / "run", **sharded, checkpoint_every=3), half, 2, "5")
    assert final_state(half / "run")["run"]["position"]["step"] == 5
    launch(small_config(digits_folder, half / "run", **sharded, resume="auto"), half, 2)
    whole = [(r["step"], r.get("train/loss"), r.get("val/loss")) for r in records(tmp_path / "two/run")]
    assert [(r["step"], r.get("train/loss"), r.get("val/loss")) for r in records(half / "run")] == whole


@pytest.mark.gpu
@pytest.mark.timeout(1200)
def test_two_gpus_learn_the_same_compiled(digits_folder, tmp_path):
    """With batch norms that both share, which torch.compile leaves out; without CUDA graphs."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA GPUs; there are {torch.cuda.device_count()}")
    words = ["train", "replknet_nano", "--data", str(digits_folder), "--image_size", "64", "--epochs", "2"]
    words += ["--global_batch", "16", "--max_batch_per_device", "4", "--lr", "5e-4", "--clip_grad", "1"]
    words += ["--drop_path", "0", "--loader.workers", "0", "--log_every", "1", "--progress", "false"]
    for speed in ("plain", "compiled"):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [*launcher, "-m", "replknet", *words, "--speed", speed, "--output", str(tmp_path / speed)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=550)
        assert done.returncode == 0, done.stderr[-3000:]
    pairs = list(zip(records(tmp_path / "plain"), records(tmp_path / "compiled"), strict=True))
    assert len(pairs) == 8 + 2
    for a, b in pairs:
        key = "train/loss" if "train/loss" in a else "val/loss"
        assert a[key] == pytest.approx(b[key], rel=0.02), (a["step"], key)
