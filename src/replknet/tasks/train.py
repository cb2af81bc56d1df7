"""Train or fine-tune a classifier: from one configuration to a run folder."""

import logging
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from timm.models import get_pretrained_cfg, is_model

from replknet import _env
from replknet._errors import UsageError
from replknet.data import IMAGENET_MEAN, IMAGENET_STD, Augmentation, ImageData, ImageFormat, LoaderConfig
from replknet.tasks import run_folder
from replknet.tasks.batching import BatchPlan, plan_batch
from replknet.tasks.checkpoints import BEST, LAST, RunCheckpoints, find_resume, read_position
from replknet.tasks.classification import Classification, ModelDescription, OptimizationConfig
from replknet.tasks.fine_tuning import build_model, frozen_modules
from replknet.tasks.logs import Progress, RunLogger, TrainingLog, make_loggers, read_metrics
from replknet.tasks.mixing import MixingConfig
from replknet.tasks.schedules import WarmupCosine
from replknet.tasks.speed import SPEEDS, ChosenSpeed, ResolvedSpeed, Speed, resolve_speed
from replknet.tasks.stopping import StopRequest
from replknet.tasks.trainer import Hardware, describe_hardware, make_trainer, quiet

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """Every option of a training; the official recipes are files under recipes/classification.

    Attributes:
        model: a model name (`replknet models` lists them), or any timm name.
        data: "digits" (embedded), a folder with train/ and val/, or a reader such as torch/cifar100, wds/..., hfds/...
        val_data: another source for validation; by default the validation split of `data`.
        val_labels: label list of a flat validation folder.
        data_root: where torchvision, Hugging Face and TensorFlow sets lie.
        download: let torchvision, Hugging Face and TensorFlow sets download what is missing.
        output: run folder: checkpoints/, metrics.jsonl, metrics.csv, config.yaml, environment.json.
        overwrite: start anew in a run folder that holds a run already, whose checkpoints and logs are then removed.
        resume: "auto" (go on from this run folder's last checkpoint if there is one), a checkpoint, or a run folder.
        weights: local checkpoint to start from; the head is new where the number of classes differs.
        pretrained: start from the model's registered weights.
        use_ema_weights: of `weights`, take the averaged ones where it has both.
        model_kwargs: further arguments of the model's constructor.
        num_classes: classes of the head; must be the data's, which is the default.
        in_chans: input channels, 1 or 3; by default the data's.
        image_size: side of the square training and validation images in pixels; by default the data's, else 224.
        mean: per-channel mean that is subtracted, for pixel values in [0, 1]; by default the model's.
        std: per-channel standard deviation that divides.
        freeze: name prefixes of modules that stay as they are, for example [stem, stages.0].
        drop_path: drop path rate of the last layer; None keeps the model's default.
        activation_checkpointing: recompute activations in the backward pass: less memory, more time.
        speed: train the model "plain", as it was built, or as `replknet.optimize` makes it: "eager", in the form that
            is fast on this device, or "compiled", by torch.compile as well (with CUDA graphs in one process on a GPU),
            which makes the first steps take minutes. What is computed differs by rounding only, but that drop path
            compiled for a GPU draws other random numbers. "auto": see `speed.resolve_speed`; the log
            and environment.json say what it came to.
        augmentation: training transforms; by default the data's own.
        epochs: passes over the training set.
        global_batch: images of one optimizer step, over all devices and accumulation steps.
        max_batch_per_device: largest batch that fits a device; the number of accumulation steps follows.
        lr: learning rate after warm-up; absolute, not scaled by the batch.
        min_lr: where the cosine ends.
        warmup_epochs: epochs of linear warm-up from 0; by default 1, or a quarter of a training of fewer than 4.
        warmup_steps: optimizer steps of warm-up, instead of warmup_epochs.
        weight_decay: AdamW's, none for 1-D parameters and biases.
        weight_decay_end: where the weight decay's cosine ends; by default it stays constant.
        layer_decay: factor of the learning rate from one layer to the one below; 1 for none.
        betas: AdamW's.
        eps: AdamW's.
        clip_grad: largest norm of the gradient; None for no limit.
        label_smoothing: share of the target spread over all classes.
        mixup: mixup's alpha; 0 for none.
        cutmix: cutmix's alpha; 0 for none.
        cutmix_minmax: smallest and largest share of each side that cutmix pastes.
        mixup_prob: probability of mixup or cutmix.
        mixup_switch_prob: probability of cutmix where both are on.
        mixup_mode: what shares a draw: batch, pair or elem.
        ema_decay: decay of the averaged weights, updated after every step; 0 for none.
        seed: of weights, data order, augmentation, mixup and drop path.
        num_samples: images of a training stream that does not tell its length.
        loader: worker processes, prefetching, where images are normalised, memory format, broken images.
        validate: score the validation set after every `validate_every` epochs, and after the last.
        validate_every: see validate.
        checkpoint_every: optimizer steps between checkpoints within an epoch; None for the ends of epochs only.
        log_every: optimizer steps between records in the log.
        wandb: project name for Weights & Biases.
        progress: show the progress bar.
        hardware: devices, nodes, precision, strategy.
    """

    model: str = ""
    data: str = ""
    val_data: str | None = None
    val_labels: str | None = None
    data_root: str | None = None
    download: bool = False
    output: str = "runs/train"
    overwrite: bool = False
    resume: str | None = None
    weights: str | None = None
    pretrained: bool = False
    use_ema_weights: bool = True
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    in_chans: int | None = None
    image_size: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    freeze: list[str] = field(default_factory=list)
    drop_path: float | None = None
    activation_checkpointing: bool = False
    speed: Speed = "auto"
    augmentation: Augmentation | None = None
    epochs: int = 10
    global_batch: int = 64
    max_batch_per_device: int | None = None
    lr: float = 1e-3
    min_lr: float = 1e-6
    warmup_epochs: float | None = None
    warmup_steps: int | None = None
    weight_decay: float = 0.05
    weight_decay_end: float | None = None
    layer_decay: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_grad: float | None = None
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_minmax: tuple[float, float] | None = None
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    ema_decay: float = 0.0
    seed: int = 0
    num_samples: int | None = None
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    validate: bool = True
    validate_every: int = 1
    checkpoint_every: int | None = None
    log_every: int = 10
    wandb: str | None = None
    progress: bool = True
    hardware: Hardware = field(default_factory=Hardware)

    @property
    def mixing(self) -> MixingConfig:
        return MixingConfig(
            mixup=self.mixup,
            cutmix=self.cutmix,
            cutmix_minmax=self.cutmix_minmax,
            prob=self.mixup_prob,
            switch_prob=self.mixup_switch_prob,
            mode=self.mixup_mode,
            label_smoothing=self.label_smoothing,
        )

    def optimization(self, steps_per_epoch: int) -> OptimizationConfig:
        """The schedules in optimizer steps."""
        total = self.epochs * steps_per_epoch
        warmup = self.warmup_steps if self.warmup_steps is not None else int(_warmup_epochs(self) * steps_per_epoch)
        end = self.weight_decay if self.weight_decay_end is None else self.weight_decay_end
        return OptimizationConfig(
            lr=WarmupCosine(self.lr, self.min_lr, total, warmup),
            weight_decay=WarmupCosine(self.weight_decay, end, total),
            layer_decay=self.layer_decay,
            betas=self.betas,
            eps=self.eps,
        )


def _warmup_epochs(config: TrainConfig) -> float:
    return min(1, config.epochs / 4) if config.warmup_epochs is None else config.warmup_epochs


# What may change when a run is resumed, since it does not change what is computed.
_FREE_DATA = {"data", "val_data", "val_labels", "data_root", "download", "loader", "validate"}
_FREE_HARDWARE = {"hardware", "max_batch_per_device", "activation_checkpointing", "speed"}
_FREE_START = {"resume", "overwrite", "weights", "pretrained", "use_ema_weights"}
_FREE_REPORTS = {"output", "progress", "wandb", "log_every", "checkpoint_every"}
_FREE = _FREE_DATA | _FREE_HARDWARE | _FREE_START | _FREE_REPORTS


@dataclass(frozen=True)
class TrainResult:
    """Where a training ended.

    Attributes:
        folder: the run folder.
        last, best: checkpoints; `best` is None without validation.
        metrics: records of metrics.jsonl in order.
        final: the last validation scores ("val/top1" in percent, ...), empty without validation.
        steps: optimizer steps in all.
        seconds: wall time of this process, resumed parts not included.
    """

    folder: Path
    last: Path
    best: Path | None
    metrics: list[dict[str, Any]]
    final: dict[str, float]
    steps: int
    seconds: float


def train(
    config: TrainConfig,
    *,
    data: ImageData | None = None,
    callbacks: Sequence[lightning.Callback] = (),
    on_stop: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train as `config` says; continue where `config.resume` says.

    Args:
        config: every option.
        data: a data module instead of the one that `config` describes.
        callbacks: further ones of Lightning's.
        on_stop: called with the signal number when a stop signal came and the state is saved; see `RunCheckpoints`.

    Raises:
        UsageError: the configuration cannot be met: unknown model, missing data, a batch that does not fit, ...
        RunError: the training failed: a loss that is not finite, a damaged checkpoint, a broken image.
        RunStoppedError: a signal stopped it; the state is saved.
    """
    with quiet():
        return _train(_checked(config), data, callbacks, on_stop)


def _train(
    config: TrainConfig,
    data: ImageData | None,
    callbacks: Sequence[lightning.Callback],
    on_stop: Callable[[int], None] | None,
) -> TrainResult:
    started = time.monotonic()
    folder = Path(config.output).expanduser().absolute()
    resume = find_resume(config.resume, folder / "checkpoints")
    goes_on = resume is not None and folder in resume.parents
    if not (config.overwrite or goes_on):
        run_folder.refuse_existing(folder)
    lightning.seed_everything(config.seed, verbose=False)
    loggers = make_loggers(folder, wandb=config.wandb, goes_on=goes_on)
    trainer = _make_trainer(config, folder, callbacks, loggers)
    _check_compiler(config, trainer)
    mixes = config.mixing.mixes
    plan = plan_batch(config.global_batch, trainer.world_size, max_per_device=config.max_batch_per_device, even=mixes)
    data = data or _make_data(config, plan)
    data.batch_size = plan.per_device
    steps = plan.steps_per_epoch(data.num_train)
    speed = resolve_speed(config.speed, trainer.strategy, steps * config.epochs, plan.accumulation)
    # A checkpoint of the run brings its own weights.
    start = replace(config, weights=None, pretrained=False) if resume else config
    module = _make_module(start, data, steps, speed.name)
    identity = _identity(config, data, plan)
    position = read_position(resume, identity) if resume else {"epoch": 0, "batch": 0, "step": 0}
    trainer.accumulate_grad_batches = plan.accumulation
    trainer.limit_train_batches = steps * plan.accumulation
    trainer.limit_val_batches = 1.0 if data.num_val else 0
    # SLURM sends SIGTERM to a job that it preempts, and ends it when the grace time is over. A job that ends by itself
    # before that counts as failed and is not queued again.
    stop = StopRequest(saving={signal.SIGTERM} if _env.submitit_executor() else ())
    trainer.callbacks += _own_callbacks(config, folder, plan, identity, stop, on_stop)  # type: ignore[attr-defined]
    run_folder.prepare(folder, keep=goes_on)
    _say_speed(config, speed)
    _write_description(folder, config, plan, trainer, steps, speed)
    _start_log(loggers, position["step"], _plain(config))
    _warn_of_slow_average(config.ema_decay, steps * config.epochs)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    finally:
        stop.close()
    _report_broken(data)
    return _result(folder, trainer, time.monotonic() - started)


def _make_trainer(
    config: TrainConfig, folder: Path, callbacks: Sequence[lightning.Callback], loggers: Sequence[Logger]
) -> lightning.Trainer:
    return make_trainer(
        config.hardware,
        folder,
        epochs=config.epochs,
        callbacks=[*callbacks, *([Progress()] if config.progress else [])],
        loggers=loggers,
        clip_grad=config.clip_grad,
        progress=config.progress,
        validate_every=config.validate_every,
    )


def _check_compiler(config: TrainConfig, trainer: lightning.Trainer) -> None:
    """Before anything is written: the network is compiled in the first step only."""
    if config.speed != "compiled" or trainer.strategy.root_device.type != "cpu":
        return
    from torch._inductor.config import cpp  # slow to import

    names = [name for name in cpp.cxx if name]
    if not any(map(shutil.which, names)):
        raise UsageError(
            f"speed compiled needs a C++ compiler on a CPU, and there is no {' or '.join(names)}: install one "
            "(CXX names another), or set speed eager"
        )


@rank_zero_only
def _say_speed(config: TrainConfig, speed: ChosenSpeed) -> None:
    if config.speed == "auto":
        _logger.info("speed auto is %s here: %s", speed.name, speed.reason)


def _own_callbacks(
    config: TrainConfig,
    folder: Path,
    plan: BatchPlan,
    identity: dict[str, Any],
    stop: StopRequest,
    on_stop: Callable[[int], None] | None,
) -> list[lightning.Callback]:
    checkpoints = RunCheckpoints(
        folder / "checkpoints",
        identity,
        stop,
        monitor="val_ema/top1" if config.ema_decay else "val/top1",
        every_steps=config.checkpoint_every,
        on_stop=on_stop,
    )
    return [TrainingLog(config.log_every, plan.global_batch), checkpoints]


def _warn_of_slow_average(decay: float, steps: int) -> None:
    """The averaged weights, by which the best checkpoint is chosen, start as the raw ones and are as good as late."""
    if decay and (share := decay**steps) > 0.01:
        _logger.warning(
            "ema_decay %g is slow for %d steps: at the end the averaged weights still hold %.0f %% of their start, and "
            "may score far below the raw ones; %g would leave 1 %%",
            decay, steps, 100 * share, float(f"{0.01 ** (1 / steps):.3g}"),
        )  # fmt: skip


def _report_broken(data: ImageData) -> None:
    """Say once, at the end, what --loader.broken skip has passed over; each was named when it was met."""
    if broken := data.broken_images():
        _logger.warning("%d broken images were skipped on this machine, the first: %s", len(broken), broken[0])


def _checked(config: TrainConfig) -> TrainConfig:
    for name in ("model", "data"):
        if not getattr(config, name):
            raise UsageError(f"no {name} was named; for example: replknet train replknet_nano --data digits")
    for name in ("epochs", "validate_every", "log_every"):
        if getattr(config, name) < 1:
            raise UsageError(f"{name} must be at least 1, got {getattr(config, name)}")
    config = replace(config, warmup_epochs=_warmup_epochs(config))
    for name in ("lr", "min_lr", "weight_decay", "warmup_epochs"):
        if getattr(config, name) < 0:
            raise UsageError(f"{name} must not be negative, got {getattr(config, name)}")
    if not 0 <= config.ema_decay < 1:
        raise UsageError(f"ema_decay must be in [0, 1), got {config.ema_decay}")
    if config.speed not in SPEEDS:
        raise UsageError(f"speed must be one of {', '.join(SPEEDS)}, got {config.speed!r}")
    if config.hardware.strategy == "fsdp" and config.speed not in ("auto", "plain"):
        raise UsageError(
            f"--hardware.strategy fsdp shards the model as it was built: speed must be plain, got {config.speed}"
        )
    if config.hardware.strategy == "fsdp" and config.ema_decay:
        raise UsageError("--hardware.strategy fsdp shards the weights and keeps no average of them: set ema_decay 0")
    return config


def _make_data(config: TrainConfig, plan: BatchPlan) -> ImageData:
    defaults = get_pretrained_cfg(config.model) if is_model(config.model) else None
    size = config.image_size or (defaults.input_size[-1] if defaults else 224)
    mean = config.mean or (defaults.mean if defaults else IMAGENET_MEAN)
    std = config.std or (defaults.std if defaults else IMAGENET_STD)
    return ImageData(
        config.data,
        image=ImageFormat(size=size, mean=tuple(mean), std=tuple(std), in_chans=config.in_chans or 3),
        batch_size=plan.per_device,
        augmentation=config.augmentation,
        loader=config.loader,
        seed=config.seed,
        val_source=config.val_data,
        validate=config.validate,
        labels=config.val_labels,
        num_classes=config.num_classes,
        root=config.data_root,
        download=config.download,
        num_samples=config.num_samples,
    )


def _make_module(config: TrainConfig, data: ImageData, steps_per_epoch: int, speed: ResolvedSpeed) -> Classification:
    kwargs = dict(config.model_kwargs)
    if config.drop_path is not None:
        kwargs["drop_path_rate"] = config.drop_path
    model = build_model(
        config.model,
        num_classes=data.num_classes,
        in_chans=data.in_chans,
        weights=config.weights,
        pretrained=config.pretrained,
        use_ema=config.use_ema_weights,
        **kwargs,
    )
    frozen = frozen_modules(model, config.freeze)
    if config.activation_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    if config.loader.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    description = ModelDescription(
        model=config.model,
        model_kwargs=config.model_kwargs,
        num_classes=data.num_classes,
        class_names=data.class_names,
        image_size=data.image_size,
        mean=data.mean,
        std=data.std,
        in_chans=data.in_chans,
    )
    return Classification(
        model,
        description,
        config.optimization(steps_per_epoch),
        config.mixing,
        ema_decay=config.ema_decay,
        seed=config.seed,
        frozen=frozen,
        speed=speed,
    )


def _identity(config: TrainConfig, data: ImageData, plan: BatchPlan) -> dict[str, Any]:
    settings = {name: value for name, value in _plain(config).items() if name not in _FREE}
    return settings | {
        "precision": config.hardware.precision,
        "images": data.num_train,
        "classes": data.num_classes,
        "per_device_batch": plan.per_device,
        "processes": plan.devices,
    }


def _plain(config: TrainConfig) -> dict[str, Any]:
    """Lists, dicts, numbers and strings only: what YAML and a weights-only load can hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(asdict(config))


@rank_zero_only
def _write_description(
    folder: Path, config: TrainConfig, plan: BatchPlan, trainer: lightning.Trainer, steps: int, speed: ChosenSpeed
) -> None:
    derived = asdict(plan) | {"steps_per_epoch": steps, "steps": steps * config.epochs}
    hardware = describe_hardware(trainer, config.hardware.precision)
    described = {"batch": derived, "hardware": hardware, "speed": speed._asdict()}
    run_folder.describe(folder, _plain(config), described)


def _start_log(loggers: Sequence[Logger], step: int, options: dict[str, Any]) -> None:
    for logger in loggers:
        if isinstance(logger, RunLogger):
            logger.rewind(step)
        else:
            logger.log_hyperparams(options)


def _result(folder: Path, trainer: lightning.Trainer, seconds: float) -> TrainResult:
    records = read_metrics(folder)
    scored = [record for record in records if "val/top1" in record]
    best = folder / "checkpoints" / BEST
    return TrainResult(
        folder=folder,
        last=folder / "checkpoints" / LAST,
        best=best if best.exists() else None,
        metrics=records,
        final={key: value for key, value in scored[-1].items() if key.startswith("val")} if scored else {},
        steps=trainer.global_step,
        seconds=seconds,
    )
