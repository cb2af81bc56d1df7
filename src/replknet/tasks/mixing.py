"""Mixup, cutmix and label smoothing, and the loss that goes with the targets they make."""

from dataclasses import dataclass

from timm.data.mixup import Mixup
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn


@dataclass(frozen=True)
class MixingConfig:
    """Settings of mixup and cutmix; both off leaves images and labels alone.

    Attributes:
        mixup: alpha of mixup's Beta distribution; 0 switches mixup off.
        cutmix: alpha of cutmix's Beta distribution; 0 switches cutmix off.
        cutmix_minmax: smallest and largest share of each side that cutmix pastes; switches cutmix on.
        prob: probability that a batch (or element) is mixed at all.
        switch_prob: probability of cutmix where both are on.
        mode: "batch", "pair" or "elem": what shares one draw.
        label_smoothing: share of the target spread evenly over the classes.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_minmax: tuple[float, float] | None = None
    prob: float = 1.0
    switch_prob: float = 0.5
    mode: str = "batch"
    label_smoothing: float = 0.1

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


class Mixing:
    """Turns a batch into what the loss needs: mixed images with soft targets, or the batch as it is.

    Draws from NumPy's global generator, which `seed_batch` seeds before each micro-batch.
    """

    def __init__(self, config: MixingConfig, num_classes: int) -> None:
        self.loss: nn.Module
        self._mixup: Mixup | None = None
        if config.mixes:
            self._mixup = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                cutmix_minmax=list(config.cutmix_minmax) if config.cutmix_minmax else None,
                prob=config.prob,
                switch_prob=config.switch_prob,
                mode=config.mode,
                label_smoothing=config.label_smoothing,
                num_classes=num_classes,
            )
            # Smoothing is in the soft targets already.
            self.loss = SoftTargetCrossEntropy()
        elif config.label_smoothing > 0:
            self.loss = LabelSmoothingCrossEntropy(smoothing=config.label_smoothing)
        else:
            self.loss = nn.CrossEntropyLoss()

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`[N, C, H, W]` and `[N]` to images and targets: `[N, classes]` when mixing, else `[N]`."""
        if self._mixup is None:
            return images, labels
        # timm mixes in place; the loader's batch stays whole for callbacks that look at it.
        return self._mixup(images.clone(), labels)
