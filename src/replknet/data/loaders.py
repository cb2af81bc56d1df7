"""DataLoaders: their settings, and the one for evaluation."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from replknet._errors import UsageError
from replknet.data.sampler import EvaluationSampler, StatefulDistributedSampler, world
from replknet.data.samples import Broken, BrokenReport, ImageSet, Samples
from replknet.data.streams import ImageStream, StreamSamples
from replknet.data.transforms import ImageFormat, evaluation_transform


@dataclass(frozen=True)
class LoaderConfig:
    """How pictures are fetched.

    Attributes:
        workers: processes that decode; None: one less than the processors, at most 8, shared among local processes.
        prefetch: batches that each worker keeps ready.
        normalize_on: "worker", or "device": uint8 batches travel (a quarter of the bytes) and are normalised there.
        channels_last: hand batches over in that memory format.
        pin_memory: page-locked batches; None: where there is a GPU.
        broken: an unreadable picture is "fatal", or named, counted and skipped ("skip").
    """

    workers: int | None = None
    prefetch: int = 4
    normalize_on: Literal["worker", "device"] = "worker"
    channels_last: bool = False
    pin_memory: bool | None = None
    broken: Broken = "fatal"

    def resolved_workers(self) -> int:
        if self.workers is not None:
            if self.workers < 0:
                raise UsageError(f"workers {self.workers}: give 0 or more")
            return self.workers
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local = max(1, torch.cuda.device_count()) if world()[1] > 1 else 1
        return max(0, min(8, available // local - 1))


def make_loader(
    samples: Samples | StreamSamples, sampler: Any, batch_size: int, config: LoaderConfig, *, drop_last: bool = False
) -> DataLoader:
    """A DataLoader with the settings of `config`; a stream's epoch is set through its sampler's `set_epoch`."""
    workers = config.resolved_workers()
    pin = torch.cuda.is_available() if config.pin_memory is None else config.pin_memory
    loader = DataLoader(
        samples,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=drop_last,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=workers > 0,
        prefetch_factor=config.prefetch if workers else None,
        collate_fn=_ChannelsLast() if config.channels_last else None,
        worker_init_fn=_ignore_stop_signals,
    )
    if isinstance(samples, StreamSamples):
        # Lightning tells the epoch to the sampler alone, and a DataLoader takes no sampler of ours for a stream.
        loader.sampler.set_epoch = samples.set_epoch  # type: ignore[attr-defined]
    return loader


def evaluation_loader(
    images: ImageSet | ImageStream,
    image: ImageFormat,
    *,
    batch_size: int = 64,
    loader: LoaderConfig | None = None,
    targets: list[int] | None = None,
    with_index: bool = False,
) -> tuple[DataLoader, BrokenReport]:
    """A loader that yields every picture once over all processes, and the report of broken pictures.

    Args:
        images: from `open_dataset(..., split="validation")`.
        image: input format of the network.
        batch_size: per process.
        loader: how pictures are fetched.
        targets: class index of the data → class index of the network.
        with_index: batches are (images, labels, indices of the samples); not for streams.
    """
    config = loader or LoaderConfig()
    transform = evaluation_transform(image, normalize=config.normalize_on == "worker")
    workers = config.resolved_workers()
    samples = make_samples(images, transform, image, batch_size, None, config.broken, workers, targets, with_index)
    sampler = None if isinstance(samples, StreamSamples) else make_sampler(len(samples), None)
    return make_loader(samples, sampler, batch_size, config), samples.report


def _ignore_stop_signals(worker: int) -> None:
    """SLURM, `timeout` and a terminal send their signals to workers too: those must outlive the saving of the state.

    They end when their loader says so, or when they find its process gone.
    """
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class _ChannelsLast:
    def __call__(self, batch: list) -> list:
        images, *rest = torch.utils.data.default_collate(batch)
        return [images.contiguous(memory_format=torch.channels_last), *rest]


def make_samples(
    images: ImageSet | ImageStream,
    transform: Callable,
    image: ImageFormat,
    batch_size: int,
    seed: int | None,
    broken: Broken,
    workers: int,
    targets: list[int] | None = None,
    with_index: bool = False,
) -> Samples | StreamSamples:
    if hasattr(images, "share_length"):
        if with_index:
            raise UsageError("a stream has no sample numbers; use a folder")
        stream: Any = images
        return StreamSamples(
            stream, transform, image, batch_size=batch_size, seed=seed, broken=broken, targets=targets, workers=workers
        )
    map_style: Any = images
    return Samples(map_style, transform, image, seed=seed, broken=broken, targets=targets, with_index=with_index)


def make_sampler(length: int, seed: int | None) -> StatefulDistributedSampler | EvaluationSampler:
    return EvaluationSampler(length) if seed is None else StatefulDistributedSampler(length, seed=seed)
