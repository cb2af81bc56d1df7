"""A training in a process of its own that can be told to die by SIGKILL in the middle of writing a checkpoint.

Usage: python _kill_child.py CONFIG.json [NUMBER OF THE WRITE THAT KILLS]
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from replknet.data import Augmentation, LoaderConfig
from replknet.tasks.train import TrainConfig, train

config = json.loads(Path(sys.argv[1]).read_text())
torch.set_num_threads(1)
whole_save = torch.save
writes = 0


def save_half_and_die(state, path):
    global writes
    writes += 1
    whole_save(state, path)
    if writes == int(sys.argv[2]):
        with open(path, "rb+") as file:
            file.truncate(os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)


if len(sys.argv) > 2:
    torch.save = save_half_and_die
config["augmentation"] = Augmentation(**config["augmentation"])
config["loader"] = LoaderConfig(**config["loader"])
config.pop("hardware")
train(TrainConfig(**config))
