"""Images for looking into a network: a folder, a data set or noise, in an order that a seed repeats."""

import hashlib
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as tv

from replknet._errors import UsageError
from replknet.data.datasets import SCHEMES, open_dataset
from replknet.data.folders import find_pictures
from replknet.data.images import BrokenImageError, load_image
from replknet.data.transforms import IMAGENET_MEAN, IMAGENET_STD

Broken = Literal["skip", "fatal"]
NOISE = "noise"

logger = logging.getLogger(__name__)


class Pictures(Protocol):
    """A sized collection of pictures with names."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def read(self, index: int, in_chans: int) -> tuple[Image.Image, int]: ...


class FolderPictures:
    """Every picture under a folder; the class is the first folder below it.

    Raises:
        UsageError: no such folder, or no pictures in it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._paths = find_pictures(root)
        if not self._paths:
            raise UsageError(f"{root}: no pictures in it or in its sub-folders")
        names = [path.relative_to(root).parts[0] if path.parent != root else "" for path in self._paths]
        order = {name: index for index, name in enumerate(sorted(set(names)))}
        self.labels = np.array([order[name] for name in names])

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return str(self._paths[index].relative_to(self._root))

    def read(self, index: int, in_chans: int) -> tuple[Image.Image, int]:
        path = self._paths[index]
        return load_image(path, in_chans=in_chans, name=str(path)), int(self.labels[index])


class PreparedImages:
    """Normalised images `[C, H, W]` of one size; every iteration gives the same ones in the same order.

    Args:
        pictures: where they come from.
        size: `(H, W)` in pixels; pictures are warped to it by bicubic interpolation, as the release's ERF script does.
        seed: shuffles the classes, and the pictures within each, and takes one picture a class in turn, so that few
            pictures still cover many classes. None keeps the collection's order, as the release does; its first
            pictures are all of one class.
        mean, std: of the normalisation, per channel.
        in_chans: 3 for RGB, 1 for grey.
        broken: "skip" leaves out pictures that cannot be read and says so; "fatal" stops at the first.
        threads: pictures decoded ahead at the same time.

    Raises:
        UsageError: another number of channels.

    Attributes:
        used: names of the pictures that the last iteration handed out.
        unreadable: what the last iteration said about pictures it could not read.
        fingerprint: digest of everything that decides what is handed out.
    """

    def __init__(
        self,
        pictures: Pictures,
        size: tuple[int, int],
        *,
        seed: int | None = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        in_chans: int = 3,
        broken: Broken = "skip",
        threads: int = 2,
    ) -> None:
        if in_chans not in (1, 3):
            raise UsageError(f"pictures have 3 channels, or 1 in grey, and the network takes {in_chans}; use noise")
        self._pictures, self._size, self._broken, self._threads = pictures, size, broken, threads
        self._in_chans = in_chans
        self._mean, self._std = list(mean)[:in_chans], list(std)[:in_chans]
        self._order = _interleaved(_labels(pictures), seed)
        self.used: list[str] = []
        self.unreadable: list[str] = []

    def __len__(self) -> int:
        return len(self._pictures)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self._size, self._mean, self._std, self._in_chans)).encode())
        for index in self._order:
            digest.update(self._pictures.name(int(index)).encode("utf-8", "surrogateescape") + b"\0")
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Tensor]:
        self.used, self.unreadable = [], []
        waiting: deque[tuple[int, Future[Tensor]]] = deque()
        with ThreadPoolExecutor(self._threads) as pool:
            try:
                for index in map(int, self._order):
                    waiting.append((index, pool.submit(self._load, index)))
                    if len(waiting) > 2 * self._threads:
                        yield from self._finish(*waiting.popleft())
                while waiting:
                    yield from self._finish(*waiting.popleft())
            finally:
                for _, future in waiting:
                    future.cancel()

    def picture(self, name: str) -> np.ndarray:
        """The picture of that name at the images' size, `[H, W, C]` uint8."""
        names = [self._pictures.name(index) for index in range(len(self._pictures))]
        image, _ = self._pictures.read(names.index(name), self._in_chans)
        height, width = self._size
        return np.atleast_3d(np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)))

    def _load(self, index: int) -> Tensor:
        image, _ = self._pictures.read(index, self._in_chans)
        height, width = self._size
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return tv.normalize(tv.to_tensor(resized), self._mean, self._std)

    def _finish(self, index: int, future: Future[Tensor]) -> Iterator[Tensor]:
        try:
            image = future.result()
        except BrokenImageError as error:
            if self._broken == "fatal":
                raise
            logger.warning("%s; left out", error)
            self.unreadable.append(str(error))
            return
        self.used.append(self._pictures.name(index))
        yield image


class NoiseImages:
    """Standard normal noise `[in_chans, H, W]`, the same images for the same seed, on any machine."""

    def __init__(self, size: tuple[int, int], *, n: int, seed: int = 0, in_chans: int = 3) -> None:
        self._size, self._n, self._seed, self._in_chans = size, n, seed, in_chans
        self.used: list[str] = []
        self.unreadable: list[str] = []

    def __len__(self) -> int:
        return self._n

    @property
    def fingerprint(self) -> str:
        return f"noise {self._seed} {self._in_chans} {self._size}"

    def __iter__(self) -> Iterator[Tensor]:
        self.used = []
        for index in range(self._n):
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + index)
            self.used.append(f"noise {self._seed}/{index}")
            yield torch.randn(self._in_chans, *self._size, generator=generator)


def open_pictures(source: str, *, split: str = "validation") -> Pictures:
    """A folder of pictures in any arrangement, or a source of `replknet.data` (`digits`, `torch/cifar10`, ...).

    Raises:
        UsageError: there is nothing of that name, or it can only be streamed.
    """
    path = Path(source).expanduser()
    if path.exists() or (source != "digits" and source.partition("/")[0] not in SCHEMES):
        return FolderPictures(path)
    data = open_dataset(source, split=split)
    if not hasattr(data, "read"):
        raise UsageError(f"{source}: can only be streamed; give a folder, or a set with random access")
    return data  # pyright: ignore[reportReturnType]


def _labels(pictures: Pictures) -> np.ndarray:
    labels = getattr(pictures, "labels", None)
    return np.zeros(len(pictures), dtype=np.int64) if labels is None else np.asarray(labels)


def _interleaved(labels: np.ndarray, seed: int | None) -> np.ndarray:
    """Indices with classes taken in turn, classes and their members shuffled by the seed."""
    if seed is None:
        return np.arange(len(labels))
    random = np.random.default_rng(seed)
    classes = random.permutation(np.unique(labels))
    rounds, positions = np.empty(len(labels), np.int64), np.empty(len(labels), np.int64)
    for position, label in enumerate(classes):
        members = random.permutation(np.flatnonzero(labels == label))
        rounds[members], positions[members] = np.arange(len(members)), position
    return np.lexsort((positions, rounds))
