"""Values that change with the optimizer step: learning rate and weight decay, as pure functions of the step.

Pure functions leave nothing to save in a checkpoint and nothing to get out of step after a resume.
"""

import math
from dataclasses import dataclass

from replknet._errors import UsageError


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up from `start` to `base`, then half a cosine from `base` to `final`.

    With W = warmup_steps and T = total_steps, for step s = 0, 1, ..., T - 1:

        s < W:   start + (base - start) * s / (W - 1)          (W = 1: start)
        s >= W:  final + (base - final) / 2 * (1 + cos(pi * (s - W) / (T - W)))

    The warm-up reaches `base` at step W - 1 and the cosine starts at `base` again at step W, as in the official
    release. At and after T the value is `final`.

    Attributes:
        base: value at the end of the warm-up.
        final: value the cosine tends to; equal to `base` for a constant.
        total_steps: optimizer steps of the whole training, > 0.
        warmup_steps: optimizer steps of the warm-up, 0 ≤ warmup_steps < total_steps.
        start: value at step 0 of the warm-up.

    Raises:
        UsageError: no steps, or a warm-up as long as the training.

    Source: `cosine_scheduler` in the official release's utils.py; cosine from Loshchilov and Hutter, arXiv:1608.03983.
    """

    base: float
    final: float
    total_steps: int
    warmup_steps: int = 0
    start: float = 0.0

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise UsageError(f"total_steps must be at least 1, got {self.total_steps}")
        if not 0 <= self.warmup_steps < self.total_steps:
            raise UsageError(
                f"a warm-up of {self.warmup_steps} steps does not fit a training of {self.total_steps} steps; "
                "lower warmup_epochs (or warmup_steps), or train longer"
            )

    def __call__(self, step: int) -> float:
        """Value used by optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.start + (self.base - self.start) * step / max(self.warmup_steps - 1, 1)
        if step >= self.total_steps:
            return self.final
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.final + 0.5 * (self.base - self.final) * (1 + math.cos(math.pi * progress))
