"""Loaders for training and validation as a LightningDataModule."""

from collections.abc import Callable
from typing import Any

import lightning
from torch.utils.data import DataLoader

from replknet._errors import UsageError
from replknet.data.datasets import open_dataset
from replknet.data.loaders import LoaderConfig, make_loader, make_sampler, make_samples
from replknet.data.sampler import mix_seed, world
from replknet.data.samples import ImageSet, Samples, seeded
from replknet.data.streams import ImageStream, StreamSamples
from replknet.data.transforms import (
    DIGIT_AUGMENTATION,
    Augmentation,
    DeviceTransform,
    ImageFormat,
    evaluation_transform,
    training_transform,
)


class ImageData(lightning.LightningDataModule):
    """Training and validation pictures from a source string (`replknet.data.open_dataset` lists them).

    Batches are `(images, labels)`: float32 `[N, in_chans, size, size]` normalised (after `on_after_batch_transfer` with
    `normalize_on="device"`), int64 `[N]`. A validation label may be `replknet.data.IGNORE` (-100, which cross_entropy
    leaves out): padding of the last batches in distributed runs, or a broken picture that was skipped. It must not be
    counted.

    Training order and augmentation are functions of (seed, epoch, sample). `state_dict` notes how far the epoch has
    come, and a restored run goes on with the next batch, at any number of workers (for streams: at the same one).

    Args:
        source: training data, and validation data unless `val_source` is given.
        image: input format of the network.
        batch_size: per process.
        val_batch_size: per process; `batch_size` by default.
        augmentation: random changes in training; by default the release's, or gentle ones for `digits`.
        loader: how pictures are fetched.
        seed: of order and augmentation.
        val_source: other validation data.
        validate: False: no validation set is opened.
        train_split, val_split: names of the splits.
        labels: label list, if the validation folder is flat.
        num_classes: expected number of classes; an error if the data disagree.
        root, download: see `open_dataset`.
        num_samples: length of a training stream that does not tell it.

    Raises:
        UsageError: data missing or empty, class counts or names that differ, too few pictures for one batch.
    """

    def __init__(
        self,
        source: str,
        *,
        image: ImageFormat | None = None,
        batch_size: int = 64,
        val_batch_size: int | None = None,
        augmentation: Augmentation | None = None,
        loader: LoaderConfig | None = None,
        seed: int = 0,
        val_source: str | None = None,
        validate: bool = True,
        train_split: str = "train",
        val_split: str = "validation",
        labels: str | None = None,
        num_classes: int | None = None,
        root: str | None = None,
        download: bool = False,
        num_samples: int | None = None,
    ):
        super().__init__()
        if batch_size < 1 or (val_batch_size is not None and val_batch_size < 1):
            raise UsageError(f"batch size {min(batch_size, val_batch_size or batch_size)}: give 1 or more")
        self.image = image or ImageFormat()
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.loader = loader or LoaderConfig()
        self.augmentation = augmentation or (DIGIT_AUGMENTATION if source == "digits" else Augmentation())
        self.seed = seed
        common: dict[str, Any] = {"root": root, "download": download, "seed": seed}
        self.train_set = open_dataset(
            source,
            split=train_split,
            training=True,
            batch_size=batch_size,
            num_samples=num_samples,
            **common,
        )
        self.val_set: ImageSet | ImageStream | None = None
        if validate:
            self.val_set = open_dataset(
                val_source or source,
                split=val_split,
                labels=labels,
                class_names=self.train_set.class_names,
                training=False,
                batch_size=self.val_batch_size,
                **common,
            )
            _require_different(self.train_set, self.val_set, source)
        self.class_names, self.num_classes = _agree_on_classes(self.train_set, self.val_set, num_classes)
        self._resume: dict[str, Any] | None = None
        self._train_samples: Samples | StreamSamples | None = None
        self._val_samples: Samples | StreamSamples | None = None
        self._device = DeviceTransform(self.image, erasing=self.augmentation.erasing)

    @property
    def image_size(self) -> int:
        return self.image.size

    @property
    def mean(self) -> tuple[float, ...]:
        return self.image.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.image.std

    @property
    def in_chans(self) -> int:
        return self.image.in_chans

    @property
    def num_train(self) -> int:
        """Training pictures."""
        return len(self.train_set)

    @property
    def num_val(self) -> int:
        return 0 if self.val_set is None else len(self.val_set)

    def train_batches(self, processes: int = 1) -> int:
        """Whole batches of an epoch on each of `processes` processes; an incomplete last one is dropped."""
        return self.num_train // (self.batch_size * processes)

    def train_dataloader(self) -> DataLoader:
        processes = world()[1]
        if not self.train_batches(processes):
            raise UsageError(
                f"{self.num_train} training pictures are fewer than one batch of "
                f"{self.batch_size} on {processes} process(es)"
            )
        transform = training_transform(self.image, self.augmentation, normalize=self._on_worker)
        loader = self._loader(self.train_set, transform, self.batch_size, seed=self.seed)
        self._train_samples = loader.dataset  # type: ignore[assignment]
        return loader

    def val_dataloader(self) -> DataLoader | list:
        """The validation loader; an empty list, which Lightning takes for "none", without a validation set."""
        if self.val_set is None:
            return []
        transform = evaluation_transform(self.image, normalize=self._on_worker)
        loader = self._loader(self.val_set, transform, self.val_batch_size, seed=None)
        self._val_samples = loader.dataset  # type: ignore[assignment]
        return loader

    def broken_images(self) -> list[str]:
        """Messages that name the pictures skipped so far on this machine."""
        reports = [samples.report for samples in (self._train_samples, self._val_samples) if samples is not None]
        return [message for report in reports for message in report.messages()]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self._on_worker:
            return batch
        images, *rest = batch
        if self.trainer is None or not self.trainer.training:
            return self._device(images), *rest
        progress = self.trainer.fit_loop
        batch_number = progress.epoch_loop.batch_progress.current.ready
        place = (world()[0], progress.epoch_progress.current.completed, batch_number)
        with seeded(mix_seed(self.seed, *place), images.device):
            return self._device(images, training=True), *rest

    def state_dict(self) -> dict[str, Any]:
        """Where training stands: {"seed", "length", "epoch", "start"}, start in pictures over all processes."""
        epoch, batches = _position(self.trainer)
        start = batches * self.batch_size * world()[1]
        return {"seed": self.seed, "length": self.num_train, "epoch": epoch, "start": start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume = dict(state_dict)

    @property
    def _on_worker(self) -> bool:
        return self.loader.normalize_on == "worker"

    def _loader(
        self, images: ImageSet | ImageStream, transform: Callable, batch_size: int, *, seed: int | None
    ) -> DataLoader:
        workers = self.loader.resolved_workers()
        samples = make_samples(images, transform, self.image, batch_size, seed, self.loader.broken, workers)
        sampler = None if isinstance(samples, StreamSamples) else make_sampler(len(samples), seed)
        if seed is not None and self._resume is not None:
            _continue(samples, sampler, self._resume, batch_size)
            self._resume = None
        return make_loader(samples, sampler, batch_size, self.loader, drop_last=seed is not None)


def _continue(samples: Samples | StreamSamples, sampler: Any, state: dict[str, Any], batch_size: int) -> None:
    if isinstance(samples, StreamSamples):
        samples.set_epoch(state["epoch"], state["start"] // (batch_size * world()[1]))
    else:
        sampler.load_state_dict(state)


def _position(trainer: Any) -> tuple[int, int]:
    """(epoch, batches done in it) of a Lightning trainer."""
    if trainer is None:
        return 0, 0
    epochs, batches = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop.batch_progress.current
    if epochs.ready <= epochs.completed:
        return epochs.completed, 0
    if batches.processed >= trainer.num_training_batches:
        return epochs.completed + 1, 0
    return epochs.completed, batches.processed


def _require_different(train: Any, validation: Any, source: str) -> None:
    same = getattr(train, "root", None), getattr(validation, "root", None)
    shards = getattr(train, "shards", None), getattr(validation, "shards", None)
    if (same[0] is not None and same[0] == same[1]) or (shards[0] is not None and shards[0] == shards[1]):
        raise UsageError(
            f"{source}: training and validation would be the same pictures; it has no split folders (train, val): "
            "give other validation data (val_source) or none (validate=False)"
        )


def _agree_on_classes(train: Any, validation: Any, num_classes: int | None) -> tuple[list[str], int]:
    names = list(train.class_names or [])
    other = list(getattr(validation, "class_names", None) or [])
    if not names:
        if num_classes is None:
            raise UsageError("the training data do not tell their classes: give their number (num_classes)")
        names = other if len(other) == num_classes else [str(index) for index in range(num_classes)]
    if num_classes is not None and len(names) != num_classes:
        raise UsageError(f"{num_classes} classes were asked for and the training data have {len(names)}")
    # A list of numbers is the class indices themselves, as flat folders with numeric labels give them.
    numeric = other == [str(index) for index in range(len(other))] and len(other) <= len(names)
    if other and other != names and not numeric:
        strange = sorted(set(other) ^ set(names))
        raise UsageError(
            f"training data have {len(names)} classes and validation data {len(other)}, which are not the same: "
            f"{', '.join(strange[:5]) or 'another order'}"
        )
    return names, len(names)
