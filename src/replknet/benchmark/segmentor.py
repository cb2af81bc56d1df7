"""Throughput of a network that is built already and maps pictures to one tensor, such as a segmentor's logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from replknet.benchmark.timing import Timed, Times
from replknet.layers import reparameterize

# Largest difference of the outputs from the unmerged float32 network, relative to the largest output.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


@dataclass(frozen=True)
class Measured:
    """One measurement; `times` in microseconds a batch, None where `error` is above the tolerance."""

    batch: int
    merged: bool
    dtype: torch.dtype
    channels_last: bool
    error: float
    times: Times | None

    @property
    def pictures_per_second(self) -> float | None:
        """At the median."""
        return None if self.times is None else self.batch / self.times.median * 1e6


def measure_network(
    network: nn.Module,
    pictures: Tensor,
    *,
    merged: tuple[bool, ...],
    dtypes: tuple[torch.dtype, ...],
    channels_last: tuple[bool, ...],
    seconds: float,
) -> Iterator[Measured]:
    """Measurements of one batch in every combination, as they come.

    Args:
        network: in evaluation mode, unmerged, float32, on the device of `pictures`.
        pictures: `[N, C, H, W]` float32.
        merged: re-parameterise.
        dtypes: under autocast, inputs stay float32.
        channels_last: memory format.
        seconds: spent on one measurement.
    """
    want = _run(network, pictures, torch.float32)
    for form in merged:
        base = reparameterize(copy.deepcopy(network)) if form else network
        for dtype in dtypes:
            for last in channels_last:
                layout = torch.channels_last if last else torch.contiguous_format
                placed = copy.deepcopy(base).to(memory_format=layout)  # type: ignore[call-overload]
                images = pictures.contiguous(memory_format=layout)
                error = _error(_run(placed, images, dtype), want)
                timed = None
                if error <= TOLERANCE[dtype]:
                    run = _call(placed, images, dtype)
                    timed = Timed(run, images.device, graph=False).times(seconds)
                yield Measured(len(images), form, dtype, last, error, timed)


def _call(network: nn.Module, images: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: _run(network, images, dtype)


@torch.no_grad()
def _run(network: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        return network(images)


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).abs().max() / want.abs().max().clamp(min=1e-12))
