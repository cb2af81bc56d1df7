"""Timing one function: CUDA graphs and events on GPUs, the clock elsewhere; and the limits of the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A replayed graph holds so many calls that its launch does not show in the time of one.
_GRAPH_SECONDS = 4e-4
_MOST_CALLS = 50


@dataclass(frozen=True)
class Times:
    """Median, 20th and 80th percentile of one call, in microseconds, and how many samples they are of."""

    median: float
    p20: float
    p80: float
    samples: int


@dataclass(frozen=True)
class Roofline:
    """What the machine can do at best, measured: bytes copied (read and written) and multiply-adds x 2 a second."""

    copy_bytes_per_second: float
    matmul_flops_per_second: float

    def floor(self, moved: int, flops: int) -> tuple[float, str]:
        """Microseconds below which no implementation can be that moves so many bytes and computes so much; and why."""
        memory, arithmetic = moved / self.copy_bytes_per_second * 1e6, flops / self.matmul_flops_per_second * 1e6
        return (memory, "bandwidth") if memory >= arithmetic else (arithmetic, "arithmetic")


class Timed:
    """A function made ready for timing: warmed up, and on a GPU captured into a CUDA graph where it lets itself be."""

    def __init__(self, run: Callable[[], Tensor], device: torch.device, *, graph: bool = True) -> None:
        self.run, self.device = run, device
        self.calls, self.graph, self.output = 1, None, run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            if graph:
                self._capture()

    def once(self) -> Tensor:
        """Run again into poisoned memory: whatever is not written is NaN."""
        if self.graph is not None:
            self.output.fill_(float("nan"))
            self.graph.replay()
            torch.cuda.synchronize(self.device)
            return self.output
        with poisoned():
            self.output = self.run()
        _synchronize(self.device)
        return self.output

    def times(self, seconds: float) -> Times:
        """Samples for about so many seconds, at least three unless one alone takes longer."""
        sample = self._sample_cuda if self.device.type == "cuda" else self._sample
        samples, start = [sample()], time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds or (len(samples) < 3 and elapsed < 4 * seconds):
            samples.append(sample())
            if len(samples) >= 500:
                break
        if len(samples) == 1:
            return Times(samples[0], samples[0], samples[0], 1)
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return Times(statistics.median(samples), fifths[0], fifths[3], len(samples))

    def _capture(self) -> None:
        start = time.perf_counter()
        self.run()
        torch.cuda.synchronize(self.device)
        calls = max(1, min(_MOST_CALLS, int(_GRAPH_SECONDS / (time.perf_counter() - start))))
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for _ in range(calls):
                    output = self.run()
        except RuntimeError:
            # Some of the candidates (old extensions) synchronise; events around plain calls measure those.
            torch.cuda.synchronize(self.device)
            return
        self.graph, self.calls, self.output = graph, calls, output

    def _sample_cuda(self) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        if self.graph is not None:
            self.graph.replay()
        else:
            self.output = self.run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / self.calls

    def _sample(self) -> float:
        _synchronize(self.device)
        start = time.perf_counter()
        self.run()
        _synchronize(self.device)
        return (time.perf_counter() - start) * 1e6


class poisoned:  # noqa: N801 - reads as a statement
    """Inside, every `torch.empty` holds NaN."""

    def __enter__(self) -> None:
        self._before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *error: Any) -> None:
        torch.use_deterministic_algorithms(self._before)


def roofline(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> Roofline:
    """Measure copy bandwidth and matrix-product rate of a device in a dtype, at the current TF32 setting."""
    big = device.type == "cuda"
    elements = (2**30 if big else 2**26) // dtype.itemsize
    source = torch.zeros(elements, dtype=dtype, device=device)
    target = torch.empty_like(source)
    copy = Timed(lambda: target.copy_(source), device).times(seconds)
    side = 8192 if big else 1024
    a, b = (torch.randn(side, side, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    product = Timed(lambda: a @ b, device).times(seconds)
    return Roofline(2 * elements * dtype.itemsize / copy.median * 1e6, 2 * side**3 / product.median * 1e6)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
