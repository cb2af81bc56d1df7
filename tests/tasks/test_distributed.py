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

CHILD = Path(__file__).with_name("_ddp_child.py")
pytestmark = pytest.mark.slow

NETWORKS = {
    "layer norm": {"model": "test_convnext", "image_size": 32},
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


def launch(config, folder: Path, processes: int) -> dict:
    folder.mkdir(parents=True)
    values = asdict(config)
    for name in ("augmentation", "loader", "hardware"):
        values.pop(name)
    (folder / "config.json").write_text(json.dumps(values))
    arguments = [str(CHILD), str(folder / "config.json"), str(folder / "reductions.json")]
    command = [sys.executable, *arguments]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        run = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
        command = [sys.executable, *run, *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=env)
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
