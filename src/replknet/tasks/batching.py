"""From the one global batch that a recipe states to what each device does."""

from dataclasses import dataclass

from replknet._errors import UsageError


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is spread: `per_device` x `accumulation` x `devices` = `global_batch` images a step."""

    global_batch: int
    devices: int
    per_device: int
    accumulation: int

    def steps_per_epoch(self, images: int) -> int:
        """Optimizer steps of an epoch; the images that do not fill a global batch are left for another epoch."""
        steps = images // self.global_batch
        if steps == 0:
            raise UsageError(
                f"the training set has {images} images, fewer than one global batch of {self.global_batch}; "
                f"set --global_batch to {images} or less"
            )
        return steps


def plan_batch(global_batch: int, devices: int, *, max_per_device: int | None = None, even: bool = False) -> BatchPlan:
    """Divide the global batch over the devices, with as few accumulation steps as the memory limit allows.

    Args:
        global_batch: images of one optimizer step, over all devices and accumulation steps.
        devices: number of processes, all machines together.
        max_per_device: the largest batch that fits one device; None for no limit.
        even: the per-device batch must be even (mixup pairs images within it).

    Raises:
        UsageError: no division exists; the message lists global batches and device counts that fit.
    """
    if global_batch < 1 or devices < 1 or (max_per_device is not None and max_per_device < 1):
        raise UsageError(
            f"global_batch, devices and max_batch_per_device must be at least 1, "
            f"got {global_batch}, {devices} and {max_per_device}"
        )
    unit = 2 if even else 1
    limit = max_per_device or global_batch
    if limit < unit:
        raise UsageError("mixup and cutmix pair images: max_batch_per_device must be at least 2; or set both to 0")
    share, rest = divmod(global_batch, devices)
    if rest == 0:
        for per_device in range(min(share, limit), 0, -1):
            if share % per_device == 0 and per_device % unit == 0:
                return BatchPlan(global_batch, devices, per_device, share // per_device)
    raise UsageError(_what_fits(global_batch, devices, unit))


def _what_fits(global_batch: int, devices: int, unit: int) -> str:
    step = devices * unit
    below = global_batch // step * step
    batches = [str(value) for value in (below, below + step) if value > 0]
    counts = [n for n in range(1, min(global_batch, 2 * devices) + 1) if global_batch % (n * unit) == 0]
    nearest = sorted(sorted(counts, key=lambda n: abs(n - devices))[:4])
    pairs = " (mixup and cutmix need an even number of images on each device)" if unit == 2 else ""
    devices_that_fit = f", or run on {' or '.join(map(str, nearest))} devices" if nearest else ""
    return (
        f"a global batch of {global_batch} cannot be shared by {devices} devices{pairs}: "
        f"set --global_batch to {' or '.join(batches)}{devices_that_fit}"
    )
