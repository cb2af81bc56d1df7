"""One of the processes of a two-process training on CPUs (gloo), started by torchrun or alone.

Usage: _ddp_child.py CONFIG.json REDUCTIONS.json [STEP]; writes how often gradients were reduced between processes. With
STEP, process 0 gets a signal to stop in that step.
"""

import json
import os
import signal
import sys
from pathlib import Path

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from replknet.data import NO_AUGMENTATION, LoaderConfig
from replknet.tasks.train import TrainConfig, train
from replknet.tasks.trainer import Hardware


class CountReductions(lightning.Callback):
    """Counts the all-reduces of gradient buckets, and the optimizer steps."""

    def __init__(self):
        self.buckets = self.steps = 0

    def on_train_start(self, trainer, pl_module):
        # Batch norms, where there are any, normalise by fixed statistics.
        for module in pl_module.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        if isinstance(trainer.strategy, DDPStrategy):
            trainer.model.register_comm_hook(None, self._reduce)

    def _reduce(self, state, bucket):
        self.buckets += bucket.is_last()
        gradient = bucket.buffer().div_(dist.get_world_size())
        return dist.all_reduce(gradient, async_op=True).get_future().then(lambda future: future.value()[0])

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps += 1
        if len(sys.argv) > 3 and trainer.global_step + 1 == int(sys.argv[3]) and trainer.global_rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)


torch.set_num_threads(1)
config = json.loads(Path(sys.argv[1]).read_text())
hardware = Hardware(accelerator="cpu", strategy=config.pop("strategy"))
config |= {"augmentation": NO_AUGMENTATION, "loader": LoaderConfig(workers=0), "hardware": hardware}
count = CountReductions()
train(TrainConfig(**config), callbacks=[count])
if not dist.is_initialized() or dist.get_rank() == 0:
    Path(sys.argv[2]).write_text(json.dumps({"reductions": count.buckets, "steps": count.steps}))
