"""Training and testing with OpenMMLab's Runner: devices, processes, precision, quiet logs, one-line errors."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import mmengine.device.utils
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel, is_model_wrapper, revert_sync_batchnorm
from mmengine.runner import Runner
from mmengine.runner.checkpoint import find_latest_checkpoint
from torch import nn

from replknet._errors import RunError, UsageError
from replknet.models.checkpoints import LoadReport, load_checkpoint
from replknet.tasks.openmmlab.checkpoint_files import read_runner_checkpoint, weights_file
from replknet.tasks.processes import process_device

Precision = Literal["fp32", "fp16", "bf16"]
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_SHOWN = re.compile(r"(Iter|Epoch)\((train|val|test)\)|Saving checkpoint|Auto resumed|Load checkpoint|backbone: ")
_ABOUT_ITSELF = re.compile(r"prefix is not set in metric|FileClient|HardDiskBackend|Could not import OneDL")


class _Shown(logging.Filter):
    """Of the Runner's lines, those on progress and warnings about the run; the whole goes to its log file."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        wanted = record.levelno >= logging.WARNING and not _ABOUT_ITSELF.search(message)
        return wanted or bool(_SHOWN.search(message))


class TaskRunner(Runner):
    """mmengine's Runner with a short console log, and with several processes on CPUs."""

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:  # type: ignore[override]
        """As the base class, with the console showing progress and warnings only."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.addFilter(_Shown())
        return logger

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """As the base class, but on CPUs with batch norm for SyncBN, which torch has for GPUs only."""
        if not self.distributed or get_device() != "cpu":
            return super().wrap_model(model_wrapper_cfg, model)
        if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
            self.logger.warning("SyncBN needs GPUs: on CPUs every process normalises with its own batch")
            model = revert_sync_batchnorm(model)
        unused = bool(self.cfg.get("find_unused_parameters", False))
        return MMDistributedDataParallel(module=model, broadcast_buffers=False, find_unused_parameters=unused)


def train(
    config: Config,
    *,
    output: str | Path,
    weights: str | Path | None = None,
    may_differ: tuple[str, ...] = (),
    resume: bool = False,
    device: str = "auto",
    precision: Precision | None = None,
    seed: int | None = None,
) -> nn.Module:
    """Train what `config` describes; under torchrun, as one of several processes.

    Args:
        config: in the current form; changed by the other arguments.
        output: work folder for checkpoints and logs.
        weights: where the whole model starts from: official weights' name or a file; None leaves it to the config.
        may_differ: beginnings of names in which `weights` may differ from the model, heads of other classes.
        resume: go on from the last checkpoint in `output`; start anew where there is none.
        device: "auto", "cpu", "cuda", "cuda:1".
        precision: of the forward pass under autocast; None as in the config.
        seed: of all random numbers.

    Returns:
        The trained model.

    Raises:
        UsageError: a config that cannot be built, missing data, an `output` that holds a run and no `resume`.
        RunError: weights that do not fit; a failure while training.
    """
    output = Path(output)
    if not resume and (output / "last_checkpoint").exists():
        raise UsageError(f"{output} holds a run already: go on with --resume true, or choose another --output")
    if weights is not None:
        weights = weights_file(weights)
    config.work_dir, config.resume = str(output), resume
    _set_precision(config, precision)
    if seed is not None:
        config.randomness = {**config.get("randomness", {}), "seed": seed}
    resumes = resume and find_latest_checkpoint(str(output)) is not None if output.is_dir() else False
    with _process(device, config) as chosen, _one_line_errors():
        if chosen.type == "cpu" and config.get("optim_wrapper", {}).get("type") == "AmpOptimWrapper":
            raise UsageError("mixed-precision training (AmpOptimWrapper) needs a GPU; on a CPU set --precision fp32")
        return _train(config, None if weights is None or resumes else _StartFrom(weights, may_differ))


def evaluate(
    config: Config,
    *,
    output: str | Path,
    prepare: Callable[[nn.Module], object] | None = None,
    device: str = "auto",
    precision: Precision | None = None,
) -> dict[str, float]:
    """Score a model on the config's test data; under torchrun, shared among processes.

    Args:
        config: in the current form.
        output: work folder for logs.
        prepare: called with the bare model before the test: loads weights, merges.
        device: "auto", "cpu", "cuda", "cuda:1".
        precision: of the forward pass under autocast.

    Returns:
        The evaluator's metrics, plain floats.
    """
    config.work_dir, config.load_from, config.resume = str(output), None, False
    for key in ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler"):
        config.pop(key, None)
    for key in ("val_dataloader", "val_cfg", "val_evaluator"):
        config.pop(key, None)
    with _process(device, config) as chosen, _one_line_errors():
        return _test(config, prepare, chosen, precision)


# The runner and the wrapped model are gone when these return, before the process group is.
def _train(config: Config, start: Hook | None) -> nn.Module:
    runner = TaskRunner.from_cfg(config)
    if start is not None:
        runner.register_hook(start)
    return bare_model(runner.train())


def _test(
    config: Config, prepare: Callable[[nn.Module], object] | None, device: torch.device, precision: Precision | None
) -> dict[str, float]:
    runner = TaskRunner.from_cfg(config)
    if prepare is not None:
        prepare(bare_model(runner.model))
    with autocast(device, precision):
        metrics = runner.test()
    return {name: float(value) for name, value in metrics.items()}


def bare_model(model: nn.Module) -> nn.Module:
    """The model without what distributes it; a wrapper for test-time augmentation stays."""
    return model.module if is_model_wrapper(model) else model  # type: ignore[return-value]


def load_weights(model: nn.Module, weights: str | Path, may_differ: tuple[str, ...] = ()) -> LoadReport:
    """Load a whole segmentor or detector strictly, from a file of the 0.x, 2.x or current releases, or by name.

    Raises:
        UsageError: neither a name nor a file.
        RunError: damaged, or it does not fit; the message lists what differs.
    """
    contents = read_runner_checkpoint(weights)
    # With mmengine's EMA hook, `state_dict` is the averaged one and `ema_state_dict` the other.
    try:
        report = load_checkpoint(model, contents, may_differ=may_differ, use_ema=False)
    except RunError as error:
        raise RunError(str(error).replace("the given state dict", str(weights), 1)) from error
    return LoadReport(**{**vars(report), "source": str(weights)})


@contextmanager
def autocast(device: torch.device, precision: Precision | None) -> Iterator[None]:
    """Inside, convolutions and linear layers compute in `precision`."""
    if precision in (None, "fp32"):
        yield
        return
    with torch.autocast(device.type, _DTYPES[str(precision)]):
        yield


def _set_precision(config: Config, precision: Precision | None) -> None:
    if precision is None or "optim_wrapper" not in config:
        return
    wrapper = config.optim_wrapper
    if precision == "fp32":
        if wrapper.get("type") == "AmpOptimWrapper":
            wrapper.type = "OptimWrapper"
            wrapper.pop("dtype", None)
            wrapper.pop("loss_scale", None)
        return
    if wrapper.get("type", "OptimWrapper") not in ("OptimWrapper", "AmpOptimWrapper"):
        raise UsageError(f"--precision {precision}: optim_wrapper is a {wrapper.type}, which has its own precision")
    wrapper.type, wrapper.dtype = "AmpOptimWrapper", str(_DTYPES[precision]).removeprefix("torch.")
    if precision == "fp16":
        wrapper.setdefault("loss_scale", "dynamic")


@contextmanager
def _process(device: str, config: Config) -> Iterator[torch.device]:
    """The device for mmengine, which takes the first kind that the machine has, and torchrun's process group."""
    before = mmengine.device.utils.DEVICE
    with process_device(device) as chosen:
        mmengine.device.utils.DEVICE = chosen.type
        config.launcher = "pytorch" if dist.is_initialized() else "none"
        try:
            yield chosen
        finally:
            mmengine.device.utils.DEVICE = before


class _StartFrom(Hook):
    """Loads the whole model's weights strictly, after the Runner's own initialisation, which would undo it."""

    def __init__(self, weights: str | Path, may_differ: tuple[str, ...]):
        self.weights, self.may_differ = weights, may_differ

    def before_train(self, runner: Runner) -> None:
        model = bare_model(runner.model)
        runner.logger.info("Load checkpoint from %s", load_weights(model, self.weights, self.may_differ))


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Failures inside the Runner as one line that tells the cause, without the workers' tracebacks."""
    try:
        yield
    except (UsageError, RunError) as error:
        raise _from_worker(error) from error
    except (KeyError, TypeError, AssertionError, FileNotFoundError) as error:
        text = _cause(error)
        raise (UsageError if _is_config(text) else RunError)(text) from error
    except RuntimeError as error:
        raise RunError(_cause(error)) from error


def _from_worker(error: Exception) -> Exception:
    return type(error)(_cause(error))


def _cause(error: BaseException) -> str:
    """Last line of a traceback that a worker process sent, or the message itself."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if any("Traceback" in line for line in lines):
        return re.sub(r"^[\w.]*?(\w+(?:Error|Exception)): ", "", lines[-1])
    first = lines[0] if lines else type(error).__name__
    named = isinstance(error, (UsageError, RunError, RuntimeError, FileNotFoundError))
    return first if named else f"{type(error).__name__}: {first}"


def _is_config(text: str) -> bool:
    return "registry" in text or "unexpected keyword" in text or "missing" in text or "class `" in text


def metrics_line(metrics: Mapping[str, float]) -> str:
    """`mIoU 51.50, mAcc 62.10`."""
    return ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())
