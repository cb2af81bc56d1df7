"""Image classification as a LightningModule: the model, its loss, its optimizer, its averaged weights."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from replknet.data import IGNORE
from replknet.models.optimize import optimize
from replknet.tasks.mixing import Mixing, MixingConfig
from replknet.tasks.parameter_groups import parameter_groups
from replknet.tasks.randomness import seed_batch
from replknet.tasks.schedules import WarmupCosine
from replknet.tasks.speed import ResolvedSpeed, takes_cuda_graphs


@dataclass(frozen=True)
class OptimizationConfig:
    """AdamW and its schedules.

    Attributes:
        lr: learning rate after the warm-up; absolute, not scaled by the batch.
        weight_decay: of parameters with two or more dimensions, biases excepted.
        layer_decay: factor of the learning rate from one layer to the one below it; 1 for none.
        betas: AdamW's.
        eps: AdamW's.
    """

    lr: WarmupCosine
    weight_decay: WarmupCosine
    layer_decay: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True)
class ModelDescription:
    """What another program needs to rebuild the model and feed it; stored in every checkpoint under "replknet"."""

    model: str
    num_classes: int
    class_names: list[str] | None = None
    image_size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    in_chans: int = 3
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain containers only, so that `torch.load(weights_only=True)` reads them."""
        values = asdict(self)
        return values | {"model_kwargs": dict(self.model_kwargs), "mean": list(self.mean), "std": list(self.std)}


class Classification(lightning.LightningModule):
    """Train and validate a classifier on batches `(images [N, C, H, W], labels [N] int64)`.

    After every optimizer step the averaged weights follow the raw ones; validation scores both on the same batches.
    A checkpoint holds the raw weights in `state_dict` (prefix `model.`), the averaged ones in `model_ema` (no prefix)
    and the model's description in `replknet`.

    Args:
        model: any module from images to logits.
        description: stored in checkpoints.
        optimization: optimizer and schedules.
        mixing: mixup, cutmix, label smoothing.
        ema_decay: of the averaged weights; 0 for none.
        seed: of mixup, drop path and dropout; see `randomness.seed_batch`.
        frozen: modules of `model` that stay as they are, batch-norm statistics included.
        speed: "plain" trains the model as it was built; "eager" and "compiled" as `replknet.optimize` makes it, without
            and with torch.compile (and CUDA graphs, see `speed.takes_cuda_graphs`). What is computed differs by
            rounding only, but for the random numbers of drop path compiled for a GPU; checkpoints are the same.
    """

    def __init__(
        self,
        model: nn.Module,
        description: ModelDescription,
        optimization: OptimizationConfig,
        mixing: MixingConfig | None = None,
        *,
        ema_decay: float = 0.0,
        seed: int = 0,
        frozen: tuple[nn.Module, ...] = (),
        speed: ResolvedSpeed = "plain",
    ) -> None:
        super().__init__()
        self.model = model
        self.description = description
        self.optimization = optimization
        self.mixing = Mixing(mixing or MixingConfig(), description.num_classes)
        self.seed = seed
        self.speed: ResolvedSpeed = speed
        # In tuples, so that neither is registered: DDP, SyncBN conversion and state_dict see the raw model only.
        self._frozen = frozen
        self._ema = (ModelEmaV3(model, decay=ema_decay).requires_grad_(False),) if ema_decay else ()
        self._counts: dict[str, Tensor] = {}
        # Of the latest validation: "val/top1" and "val_ema/top1" in percent, top5, loss; the same on every process.
        self.scores: dict[str, float] = {}
        # Of the latest micro-batch, for logs.
        self.last_loss = torch.zeros(())
        self._keeps_gradients = False

    @property
    def ema(self) -> nn.Module | None:
        """The model with averaged weights, or None."""
        return self._ema[0].module if self._ema else None

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def setup(self, stage: str) -> None:
        """On the model's device, and before a strategy wraps it: `optimize` chooses by the one and alters the other."""
        if stage == "fit" and self.speed != "plain":
            strategy = self.trainer.strategy
            self.model.to(strategy.root_device)
            cuda_graph = takes_cuda_graphs(self.speed, strategy)
            optimize(self.model, "training", compile=self.speed == "compiled", cuda_graph=cuda_graph)
            # A CUDA graph's gradients lie in its own memory, which the next micro-batch overwrites, and autograd takes
            # the first of them for `grad` itself. Where micro-batches add up, `grad` is therefore there beforehand.
            self._keeps_gradients = cuda_graph and self.trainer.accumulate_grad_batches > 1
            for ema in self._ema:
                ema.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def configure_model(self) -> None:
        """Lightning's place for sharding; does nothing under any other strategy."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            assert self.device_mesh is not None
            shard(self.model, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        settings = self.optimization
        groups = parameter_groups(self.model, weight_decay=settings.weight_decay(0), layer_decay=settings.layer_decay)
        return torch.optim.AdamW(groups, lr=settings.lr(0), betas=settings.betas, eps=settings.eps)

    def on_fit_start(self) -> None:
        # Lightning leaves the modes of modules as they are.
        self.train()
        for ema in self._ema:
            ema.to(self.device)

    def train(self, mode: bool = True) -> "Classification":
        super().train(mode)
        for module in getattr(self, "_frozen", ()):
            module.eval()
        return self

    def on_train_epoch_start(self) -> None:
        self.scores = {}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_batch(self.seed, self.global_rank, self.current_epoch, batch_idx)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = self.mixing(*batch)
        loss = self.mixing.loss(_at_least_float32(self(images)), targets)
        self.last_loss = loss.detach()
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        step = self.global_step
        lr, weight_decay = self.optimization.lr(step), self.optimization.weight_decay(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            if group["decays"]:
                group["weight_decay"] = weight_decay

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=not self._keeps_gradients)
        if self._keeps_gradients:
            # Here, because Lightning clears all gradients behind `on_fit_start`.
            for parameter in self.model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        for ema in self._ema:
            ema.update(self.model)

    def on_validation_epoch_start(self) -> None:
        names = ("val", "val_ema") if self._ema else ("val",)
        self._counts = {name: torch.zeros(4, dtype=torch.float64, device=self.device) for name in names}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        # A compiled model would be compiled again, for its evaluation mode and for the last batch, which is smaller.
        with torch.compiler.set_stance("force_eager") if self.speed == "compiled" else nullcontext():
            self._counts["val"] += count_correct(self.model(images), labels)
        if self.ema is not None:
            self._counts["val_ema"] += count_correct(self.ema(images), labels)

    def on_validation_epoch_end(self) -> None:
        for name, counts in self._counts.items():
            total = self.trainer.strategy.reduce(counts, reduce_op="sum")
            top1, top5, loss, images = (float(value) for value in total)
            scores = {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "loss": loss / images}
            self.scores |= {f"{name}/{key}": value for key, value in scores.items()}
            # For the progress bar; every process has the sum over all of them already.
            self.log(f"{name}/top1", scores["top1"], prog_bar=True, logger=False, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["replknet"] = self.description.as_dict()
        if self.ema is not None:
            checkpoint["model_ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.ema is not None:
            self.ema.load_state_dict(checkpoint["model_ema"])


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the parameters of `model` over `mesh` by torch's `fully_shard`, in place, part by part.

    Parts are the members of its `nn.Sequential`s (blocks, stages), which are gathered when they run; what is left goes
    with the whole. Names stay as they are, and so do layer groups and checkpoints. On GPUs batch norms are
    synchronised, as under DDP.
    """
    if mesh.device_type == "cuda" and mesh.size() > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    containers = [module for module in model.modules() if isinstance(module, nn.Sequential)]
    # The inner parts first: a part holds what its own parts do not.
    for container in reversed(containers):
        for part in container.children():
            if any(True for _ in part.parameters()):
                fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over a batch: right at rank 1, right within rank 5, cross-entropy, images.

    Args:
        logits: `[N, classes]`.
        labels: `[N]`, int64; images labelled `IGNORE` are left out.

    Returns:
        `[4]` float64. With five classes or fewer, every image counts as right within rank 5.
    """
    logits = _at_least_float32(logits)
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE)
    sums = (ranked[:, 0].sum(), ranked.sum(), loss, (labels != IGNORE).sum())
    return torch.stack([value.double() for value in sums])


def _at_least_float32(logits: Tensor) -> Tensor:
    # Autocast on a CPU would compute the loss in bfloat16.
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
