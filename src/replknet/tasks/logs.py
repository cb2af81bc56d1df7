"""What a run writes down while it goes: metrics.jsonl, metrics.csv, TensorBoard, Weights & Biases, progress."""

import csv
import importlib.util
import io
import json
import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from replknet._errors import RunError, UsageError
from replknet._files import write_text


class RunLogger(Logger):
    """One JSON object a record in `metrics.jsonl`; the same rows in `metrics.csv`, rewritten after every epoch."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The resolved configuration is in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step} | metrics) + "\n")

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Forget records after `step`, and a last line that a kill cut short."""
        kept = [record for record in read_metrics(self.folder) if record["step"] <= step]
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))

    @rank_zero_only
    def save(self) -> None:
        records = read_metrics(self.folder)
        columns = list(dict.fromkeys(key for record in records for key in record))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        write_text(self.folder / "metrics.csv", table.getvalue())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Records of a run folder's metrics.jsonl, oldest first; an unfinished last line is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def make_loggers(folder: Path, *, wandb: str | None = None, goes_on: bool = False) -> list[Logger]:
    """The run's own log, TensorBoard where it is installed, Weights & Biases where a project is named.

    With `goes_on`, Weights & Biases continues the run that it has of this folder.
    """
    loggers: list[Logger] = [RunLogger(folder)]
    if importlib.util.find_spec("tensorboard"):
        loggers.append(TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False))
    if wandb:
        if not importlib.util.find_spec("wandb"):
            raise UsageError(f"--wandb {wandb} needs the package wandb: pip install wandb, or leave --wandb out")
        from lightning.pytorch.loggers import WandbLogger

        run = _wandb_run(folder) if goes_on else None
        loggers.append(WandbLogger(project=wandb, name=folder.name, save_dir=folder, version=run))
    return loggers


def _wandb_run(folder: Path) -> str | None:
    """The id of a folder's latest run, from the name that Weights & Biases gave its files: run-DATE-ID."""
    latest = folder / "wandb" / "latest-run"
    return latest.resolve().name.rpartition("-")[2] if latest.exists() else None


class TrainingLog(lightning.Callback):
    """Loss, learning rate, speed and waiting time every `every` steps; validation scores every epoch.

    The logged loss is the mean over the steps since the last record and over all processes. A loss that is not finite
    ends the run before it can reach a checkpoint.
    """

    def __init__(self, every: int, global_batch: int) -> None:
        self.every, self.global_batch = every, global_batch
        self._loss_sum: torch.Tensor | None = None
        self._batches = 0
        self._last_step = 0
        self._mark = self._waited = self._window_start = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"loss_sum": self._loss_sum, "batches": self._batches, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loss_sum, self._batches = state_dict["loss_sum"], state_dict["batches"]
        self._last_step = state_dict["last_step"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._loss_sum is not None:
            self._loss_sum = self._loss_sum.to(pl_module.device)
        self._restart_clock()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._waited += time.perf_counter() - self._mark

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = pl_module.last_loss
        self._loss_sum = loss.double() if self._loss_sum is None else self._loss_sum + loss
        self._batches += 1
        step = trainer.global_step
        if step > self._last_step and step % self.every == 0:
            self._write(trainer, step)
        self._mark = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if self._batches:
            self._write(trainer, trainer.global_step)
        if pl_module.scores:
            log_everywhere(trainer, {"epoch": trainer.current_epoch} | pl_module.scores, trainer.global_step)
        for logger in trainer.loggers:
            logger.save()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # Validation is neither training time nor waiting for training data.
        self._window_start += time.perf_counter() - self._mark
        self._mark = time.perf_counter()

    def _write(self, trainer: lightning.Trainer, step: int) -> None:
        assert self._loss_sum is not None
        mean = self._loss_sum / self._batches
        loss = float(trainer.strategy.reduce(mean, reduce_op="mean"))
        if not math.isfinite(loss):
            raise RunError(
                f"the loss became {loss} in steps {self._last_step + 1} to {step}; "
                "checkpoints/last.ckpt is from before. "
                "Lower --lr, lengthen --warmup_epochs, set --clip_grad, or use --precision fp32"
            )
        elapsed = time.perf_counter() - self._window_start
        group = max(trainer.optimizers[0].param_groups, key=lambda group: group["lr"])
        decay = max(group["weight_decay"] for group in trainer.optimizers[0].param_groups)
        record = {
            "epoch": trainer.current_epoch,
            "train/loss": loss,
            "train/lr": group["lr"],
            "train/weight_decay": decay,
            "train/images_per_second": self.global_batch * (step - self._last_step) / elapsed,
            "train/data_wait_share": self._waited / elapsed,
        }
        log_everywhere(trainer, record, step)
        self._loss_sum, self._batches, self._last_step = None, 0, step
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._waited = 0.0
        self._mark = self._window_start = time.perf_counter()


def log_everywhere(trainer: lightning.Trainer, metrics: dict[str, Any], step: int) -> None:
    """Send one record to every logger of the trainer."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step)


class Progress(TQDMProgressBar):
    """Lightning's bar with the time left for the whole run beside the epoch's."""

    def __init__(self) -> None:
        super().__init__()
        self._started: tuple[float, int] | None = None

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, Any]:
        metrics = dict(super().get_metrics(trainer, pl_module))
        metrics.pop("v_num", None)
        done, total = trainer.global_step, trainer.estimated_stepping_batches
        if self._started is None:
            self._started = time.monotonic(), done
        start, first = self._started
        if done > first and math.isfinite(total):
            left = (time.monotonic() - start) / (done - first) * (total - done)
            metrics["run_left"] = str(timedelta(seconds=int(left)))
        return metrics
