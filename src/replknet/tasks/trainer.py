"""The Lightning Trainer for where the program runs: one process, torchrun, srun, or a submitit job."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from replknet import _env
from replknet._errors import UsageError
from replknet.tasks.checkpoints import AtomicCheckpointIO

Precision = Literal["fp32", "bf16", "fp16"]
_SUPERFLUOUS_WARNINGS = (
    # The data module carries the position in the data; Lightning looks for it in the loader.
    "You're resuming from a checkpoint that ended before the epoch ended",
    # Lightning 2.6 on torch 2.14.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # The number of workers is the user's choice.
    ".*does not have many workers",
    # Streams here share out their pictures among workers.
    "Your `IterableDataset` has `__len__` defined",
    # Training without validation is a choice, too.
    "You defined a `validation_step` but have no `val_dataloader`",
    # Login nodes have it; `replknet submit` uses it.
    "The `srun` command is available",
    # Frozen modules are meant to be in eval mode.
    r"Found \d+ module\(s\) in eval mode",
    # torch captures an empty one to set up the memory of CUDA graphs.
    "The CUDA Graph is empty",
)
_LIGHTNING_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


@dataclass(frozen=True)
class Hardware:
    """Where a run computes.

    Attributes:
        accelerator: "auto", "cpu", "gpu" or another of Lightning's names.
        devices: processes on this machine; "auto" takes every GPU, or one process on a CPU. Under torchrun, srun and
            submitit the launcher decides.
        nodes: machines; the launcher decides where there is one.
        precision: "fp32"; "bf16" and "fp16" are mixed precision, weights stay in float32.
        strategy: "auto" (one process, or DDP for more), "ddp", or "fsdp", which shards weights,
            gradients and optimizer state over the processes, for models too large for one device.
    """

    accelerator: str = "auto"
    devices: int | Literal["auto"] = "auto"
    nodes: int = 1
    precision: Precision = "fp32"
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"


def make_trainer(
    hardware: Hardware,
    folder: Path,
    *,
    epochs: int,
    callbacks: Sequence[lightning.Callback],
    loggers: Sequence[Logger],
    clip_grad: float | None = None,
    progress: bool = True,
    validate_every: int = 1,
    sync_batchnorm: bool = True,
) -> lightning.Trainer:
    """A Trainer whose `world_size` is known; accumulation and epoch length are set from it afterwards.

    Raises:
        UsageError: the hardware asked for is not there.
    """
    launch = _env.distributed_launch()
    devices, nodes = (launch.devices, launch.nodes) if launch else (hardware.devices, hardware.nodes)
    accelerator = hardware.accelerator
    if accelerator == "auto" and not torch.cuda.is_available():
        accelerator = "cpu"
    if devices == "auto":
        # Counted here: Lightning resolves "auto" too late for the choice between one process and DDP.
        devices = 1 if accelerator == "cpu" else torch.cuda.device_count() or "auto"
    if hardware.precision == "fp16" and accelerator == "cpu":
        raise UsageError("--precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
    many = devices != 1 or nodes != 1
    try:
        return lightning.Trainer(
            accelerator=accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=_strategy(hardware.strategy, accelerator, devices, nodes),
            precision=_LIGHTNING_PRECISION[hardware.precision],  # type: ignore[arg-type]
            plugins=[AtomicCheckpointIO(), *_environment(launch)],
            max_epochs=epochs,
            gradient_clip_val=clip_grad,
            callbacks=[*callbacks, ValidateLastEpoch()],
            logger=list(loggers),
            log_every_n_steps=1,
            enable_progress_bar=progress,
            # RunCheckpoints takes its place, once the number of processes is known.
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=validate_every,
            # SyncBatchNorm exists for GPUs only.
            sync_batchnorm=sync_batchnorm and many and accelerator != "cpu",
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
    except MisconfigurationException as error:
        raise UsageError(f"this machine cannot run --accelerator {accelerator} --devices {devices}: {error}") from error


class ValidateLastEpoch(lightning.Callback):
    """Whatever `validate_every` is, a run ends with its scores."""

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.max_epochs is not None and trainer.current_epoch + 1 >= trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1


def _strategy(name: str, accelerator: str, devices: int | str, nodes: int) -> Strategy | str:
    many = devices != 1 or nodes != 1
    backend = "gloo" if accelerator == "cpu" else None
    if name == "fsdp":
        # Lightning's strategy for torch's fully_shard; `Classification.configure_model` says what is sharded.
        return ModelParallelStrategy(
            data_parallel_size=nodes * (devices if isinstance(devices, int) else torch.cuda.device_count()),
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=backend,
        )
    # "auto" devices on GPUs may turn out to be one: Lightning then uses DDP with one process, which changes nothing.
    if name == "ddp" or many:
        return DDPStrategy(find_unused_parameters=False, process_group_backend=backend)
    return "auto"


def _environment(launch: _env.Launch | None) -> list[ClusterEnvironment]:
    if launch is None:
        return []
    if launch.kind == "slurm":
        # submitit (or the batch script) requeues; Lightning's own requeue saves inside the signal handler.
        return [SLURMEnvironment(auto_requeue=False)]
    return [TorchElasticEnvironment()]


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's remarks about itself; its warnings about the training stay."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    if logging.getLogger().level > logging.DEBUG:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in _SUPERFLUOUS_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logger.setLevel(level)


def describe_hardware(trainer: lightning.Trainer, precision: str) -> dict[str, Any]:
    """What environment.json records about the trainer."""
    return {
        "processes": trainer.world_size,
        "nodes": trainer.num_nodes,
        "accelerator": type(trainer.accelerator).__name__,
        "strategy": type(trainer.strategy).__name__,
        "precision": precision,
    }
