"""From a set of pictures to tensors: seeded augmentation, and what happens to a picture that cannot be read."""

import logging
import os
import random
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from replknet.data.images import BrokenImageError
from replknet.data.sampler import PADDING, SampleKey, mix_seed
from replknet.data.transforms import ImageFormat, Transform

# Target of a sample that must not count: padding, or a broken picture that was skipped. It is also what
# torch.nn.functional.cross_entropy and torchmetrics' ignore_index leave out.
IGNORE = -100

Broken = Literal["fatal", "skip"]
# As many neighbours are tried before training gives up on a broken picture.
_NEIGHBOURS = 10

_logger = logging.getLogger(__name__)


class ImageSet(Protocol):
    """A sized collection of labelled pictures with random access."""

    @property
    def class_names(self) -> list[str]: ...
    def __len__(self) -> int: ...
    def read(self, index: int, in_chans: int) -> tuple[Image.Image, int]:
        """The picture (RGB or grey) and its class index; BrokenImageError names what cannot be read."""
        ...

    def name(self, index: int) -> str: ...


class BrokenReport:
    """Names of broken pictures, collected over all worker processes of one machine in a small temporary file."""

    def __init__(self) -> None:
        handle, path = tempfile.mkstemp(prefix="replknet-broken-")
        os.close(handle)
        self._path = path
        # The owner removes the file; workers hold copies of this object, which must not.
        weakref.finalize(self, _remove, path, os.getpid())

    def add(self, message: str) -> None:
        line = " ".join(message.split()) + "\n"
        # One short write in append mode is not torn by other workers.
        with open(self._path, "ab", buffering=0) as file:
            file.write(line.encode("utf-8", "backslashreplace"))
        _logger.warning("%s; skipped", message)

    def messages(self) -> list[str]:
        """One line for each broken picture, in the order in which they were met first."""
        try:
            lines = Path(self._path).read_bytes().decode().splitlines()
        except FileNotFoundError:
            return []
        return list(dict.fromkeys(lines))

    def __len__(self) -> int:
        return len(self.messages())


class Samples(Dataset):
    """(tensor, class index) for a `SampleKey` or a plain index.

    Training (`seed` given): all random numbers of a sample are drawn from a seed made of (seed, epoch, index), so that
    it looks the same for any number of workers and after any interruption. Evaluation: `seed=None`.

    A broken picture is an error ("fatal"), or is named, counted and skipped ("skip"): training takes the next readable
    one instead, evaluation gives the target `IGNORE`. `PADDING` as an index gives `IGNORE` too.
    """

    def __init__(
        self,
        images: ImageSet,
        transform: Transform,
        image: ImageFormat,
        *,
        seed: int | None = None,
        broken: Broken = "fatal",
        with_index: bool = False,
        targets: list[int] | None = None,
    ):
        self.images, self.transform, self.image = images, transform, image
        self.seed, self.broken, self.with_index = seed, broken, with_index
        # Class index of the data → class index of the network; None: they are the same.
        self.targets = targets
        self.report = BrokenReport()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: SampleKey | int):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        tensor, target = self._sample(epoch, index)
        return (tensor, target, index) if self.with_index else (tensor, target)

    def _sample(self, epoch: int, index: int) -> tuple[Tensor, int]:
        if index == PADDING:
            return self._blank(), IGNORE
        for step in range(_NEIGHBOURS if self.seed is not None else 1):
            try:
                picture, target = self.images.read((index + step) % len(self.images), self.image.in_chans)
            except BrokenImageError as error:
                if self.broken == "fatal":
                    raise
                self.report.add(str(error))
                continue
            target = target if self.targets is None else self.targets[target]
            return self._transform(picture, epoch, index), target
        if self.seed is None:
            return self._blank(), IGNORE
        raise BrokenImageError(f"{_NEIGHBOURS} pictures in a row cannot be read, from {self.images.name(index)} on")

    def _transform(self, picture: Image.Image, epoch: int, index: int) -> Tensor:
        if self.seed is None:
            return self.transform(picture)
        with seeded(mix_seed(self.seed, epoch, index)):
            return self.transform(picture)

    def _blank(self) -> Tensor:
        grey = "RGB" if self.image.in_chans == 3 else "L"
        return torch.zeros_like(self.transform(Image.new(grey, (self.image.size, self.image.size))))


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Random numbers of Python, NumPy and torch from `seed` inside; the states from before come back after.

    Of torch's generators: the CPU's, and that of `device` if it is a GPU. In a DataLoader's worker nothing comes back:
    nobody else draws there, and saving would take a fifth of the time of a small picture.
    """
    gpu = device if device is not None and device.type == "cuda" else None
    states = None if get_worker_info() else (random.getstate(), np.random.get_state(), torch.get_rng_state())
    gpu_state = torch.cuda.get_rng_state(gpu) if gpu is not None else None
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would also touch every GPU's generator.
    torch.default_generator.manual_seed(seed)
    if gpu is not None:
        with torch.cuda.device(gpu):
            torch.cuda.manual_seed(seed)
    try:
        yield
    finally:
        if states is not None:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
        if gpu is not None and gpu_state is not None:
            torch.cuda.set_rng_state(gpu_state, gpu)


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:
        Path(path).unlink(missing_ok=True)
