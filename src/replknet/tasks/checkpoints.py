"""Checkpoints of a run: whole or not there, best and last, and what is checked before one is resumed."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from replknet._errors import RunError, UsageError
from replknet._files import replacing
from replknet.tasks.stopping import RunStoppedError, StopRequest

LAST, BEST = "last.ckpt", "best.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to the disk, then renames: a kill leaves the earlier checkpoint whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with replacing(Path(path)) as temporary:
            torch.save(checkpoint, temporary)


class RunCheckpoints(Checkpoint):
    """`last.ckpt` after every epoch (and every `every_steps` steps), `best.ckpt` where the monitored score rises.

    Args:
        folder: where both go.
        identity: settings that a resumed run must share; stored under "run" with the position in the data.
        stop: a stop request is obeyed after the step, when the state is saved.
        monitor: score that picks `best.ckpt`, higher is better; without it there is no best.
        every_steps: optimizer steps between saves within an epoch; None for epoch ends only.
        on_stop: called once the state is saved; raises or returns (then `RunStoppedError` is raised).
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        stop: StopRequest,
        *,
        monitor: str,
        every_steps: int | None = None,
        on_stop: Callable[[int], None] | None = None,
    ) -> None:
        self.folder, self.identity, self.stop = folder, dict(identity), stop
        self.monitor, self.every_steps, self.on_stop = monitor, every_steps, on_stop
        self.best: float | None = None
        self._position = {"epoch": 0, "batch": 0, "step": 0}
        self._last_step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._last_step = trainer.global_step
        # Here, after Lightning has installed handlers of its own, which talk to other processes inside a handler.
        self.stop.listen()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        # The end of an epoch is saved after its validation; in between gradients are accumulating.
        if step == self._last_step or batch_idx + 1 >= trainer.num_training_batches:
            return
        self._last_step = step
        stopping, saving = self._requests(trainer)
        if stopping or saving or (self.every_steps and step % self.every_steps == 0):
            self._save(trainer, pl_module, epoch=trainer.current_epoch, batch=batch_idx + 1)
        if stopping:
            self._stop(step)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._last_step = trainer.global_step
        score = pl_module.scores.get(self.monitor)
        improved = score is not None and (self.best is None or score > self.best)
        if improved:
            self.best = score
        self._save(trainer, pl_module, epoch=trainer.current_epoch + 1, batch=0)
        if improved:
            _copy(self.folder / LAST, self.folder / BEST)
        if self._requests(trainer)[0]:
            self._stop(trainer.global_step)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = {"identity": self.identity, "position": self._position}

    def _save(self, trainer: lightning.Trainer, pl_module: Any, *, epoch: int, batch: int) -> None:
        values = [p.detach() for p in pl_module.parameters()]
        if not all(bool(torch.isfinite(value).all()) for value in values):
            raise RunError(
                f"the weights are not finite after step {trainer.global_step}; checkpoints/last.ckpt is from before. "
                "Lower --lr, lengthen --warmup_epochs, set --clip_grad, or use --precision fp32"
            )
        self._position = {"epoch": epoch, "batch": batch, "step": trainer.global_step}
        trainer.save_checkpoint(self.folder / LAST)

    def _requests(self, trainer: lightning.Trainer) -> tuple[bool, bool]:
        """Whether any process was asked to stop, and to save; all save together, so one's request is everyone's."""
        anyone = trainer.strategy.reduce_boolean_decision
        if not anyone(self.stop.signum is not None or self.stop.save, all=False):
            return False, False
        stopping, saving = anyone(self.stop.signum is not None, all=False), anyone(self.stop.save, all=False)
        self.stop.save = False
        return stopping, saving

    def _stop(self, step: int) -> None:
        signum = self.stop.signum or 15
        if self.on_stop is not None:
            self.on_stop(signum)
        raise RunStoppedError(signum, step)


@rank_zero_only
def _copy(source: Path, target: Path) -> None:
    with replacing(target) as temporary:
        try:
            # `last.ckpt` is replaced, never rewritten, so that a second name for its data is a copy.
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def find_resume(resume: str | Path | None, folder: Path) -> Path | None:
    """The checkpoint to go on from: "auto" looks for last.ckpt in `folder` and nowhere else; None starts anew."""
    if resume is None:
        return None
    if str(resume) == "auto":
        path = folder / LAST
        return path if path.exists() else None
    path = Path(resume).expanduser().absolute()
    if path.is_dir():
        path = path / "checkpoints" / LAST
    if not path.is_file():
        raise UsageError(f"--resume {resume}: no such checkpoint; give a .ckpt file, a run folder, or auto")
    return path


def read_position(path: Path, identity: Mapping[str, Any]) -> dict[str, int]:
    """Position stored in a checkpoint, after checking that it belongs to a run with this identity.

    Returns:
        {"epoch", "batch", "step"}: micro-batches of `epoch` that are done, and optimizer steps in all.

    Raises:
        RunError: the file is not a whole checkpoint of such a run; the message names what differs.
    """
    try:
        run = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["run"]
        theirs, position = run["identity"], run["position"]
    except Exception as error:
        raise RunError(
            f"{path} cannot be resumed: it is damaged or no checkpoint of `replknet train` ({type(error).__name__}); "
            "to start from its weights, use --weights"
        ) from error
    names = [name for name in {**theirs, **identity} if theirs.get(name) != identity.get(name)]
    if position["batch"] == 0:
        # Between epochs the same global batch may be shared out anew.
        names = [name for name in names if name not in ("per_device_batch", "processes")]
    if names:
        changes = ", ".join(f"{name} {theirs.get(name)!r} -> {identity.get(name)!r}" for name in names)
        raise RunError(
            f"{path} belongs to another run: {changes}. A resumed run keeps its settings; "
            "to start a new run from these weights, use --weights"
        )
    return position
