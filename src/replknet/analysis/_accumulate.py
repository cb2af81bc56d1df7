"""The bookkeeping of a long average over images: single images out of any source, sums, and sums on disk."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from replknet._errors import RunError, UsageError
from replknet._files import replacing

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_STATES = 10.0


class Accumulator:
    """Sums of contributions in float64, one matrix a layer."""

    def __init__(self, names: Sequence[str], size: tuple[int, int]) -> None:
        self.sums = {name: np.zeros(size) for name in names}
        self.feature_size: dict[str, tuple[int, int]] = {}
        self.count = 0
        self.not_finite = 0

    def add(self, maps: dict[str, Tensor]) -> None:
        arrays = {name: maps[name].detach().cpu().double().numpy() for name in self.sums}
        for index in range(len(next(iter(arrays.values())))):
            image = {name: array[index] for name, array in arrays.items()}
            if all(np.isfinite(one).all() for one in image.values()):
                for name, one in image.items():
                    self.sums[name] += one
                self.count += 1
            else:
                self.not_finite += 1


class State:
    """The sums on disk, so that a long run survives being stopped."""

    def __init__(self, path: Path | str | None, total: Accumulator, fingerprint: Callable[[], dict[str, Any]]) -> None:
        self.path = Path(path) if path is not None else None
        self.total = total
        self.fingerprint = fingerprint() if path is not None else {}
        self.saved = time.monotonic()

    def load(self) -> int:
        """Take up a stopped run; the number of images it had seen."""
        if self.path is None or not self.path.exists():
            return 0
        try:
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                values = {key: stored[key] for key in stored.files}
            theirs = json.loads(str(values["fingerprint"]))
            sums = {name: values[f"sum/{name}"] for name in theirs["layers"]}
            sizes = {name: tuple(int(side) for side in values[f"size/{name}"]) for name in theirs["layers"]}
            count, not_finite = int(values["count"]), int(values["not_finite"])
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise RunError(f"{self.path} is no readable state file ({error}); remove it to start anew") from error
        differs = sorted(key for key in self.fingerprint if theirs.get(key) != self.fingerprint[key])
        if differs:
            raise UsageError(
                f"{self.path} belongs to a run with another {', '.join(differs)}; remove it to start anew, or name "
                "another output folder"
            )
        self.total.sums.update(sums)
        self.total.feature_size.update(sizes)
        self.total.count, self.total.not_finite = count, not_finite
        logger.info("taking up %s at %d images", self.path, count)
        return count + not_finite

    def save_if_due(self) -> None:
        if self.path is not None and time.monotonic() - self.saved >= _SECONDS_BETWEEN_STATES:
            self.save()

    @contextmanager
    def saved_on_failure(self) -> Iterator[None]:
        """Keep what was summed when the block is interrupted or fails."""
        try:
            yield
        except BaseException:
            if self.path is not None and self.total.count:
                self.save()
            raise

    def save(self) -> None:
        assert self.path is not None
        sums = {f"sum/{name}": matrix for name, matrix in self.total.sums.items()}
        sizes = {f"size/{name}": np.array(size) for name, size in self.total.feature_size.items()}
        arrays: dict[str, Any] = {
            "fingerprint": json.dumps(self.fingerprint),
            "count": self.total.count,
            "not_finite": self.total.not_finite,
            **sums,
            **sizes,
        }
        with replacing(self.path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
        self.saved = time.monotonic()

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class SingleImages:
    """Single images `[C, H, W]` of one size out of whatever the caller has."""

    def __init__(self, images: Tensor | Iterable[Any]) -> None:
        self._iterator: Iterator[Tensor] = _flatten(images)
        self._size: tuple[int, ...] | None = None

    def peek(self) -> Tensor:
        """The first image; it is still handed out by `take`."""
        first = next(self._iterator, None)
        if first is None:
            raise UsageError("there are no images")
        self._iterator = chain([first], self._iterator)
        self._size = tuple(first.shape)
        return first

    def skip(self, count: int) -> None:
        """Pass over images that an earlier run has seen."""
        for _ in range(count):
            if not self.take(1):
                return

    def take(self, count: int) -> list[Tensor]:
        """The next images, fewer at the end."""
        batch: list[Tensor] = []
        while len(batch) < count and (image := next(self._iterator, None)) is not None:
            if tuple(image.shape) != self._size:
                raise UsageError(f"images of one size are needed: {tuple(image.shape)} came after {self._size}")
            batch.append(image)
        return batch


def _flatten(source: Tensor | Iterable[Any]) -> Iterator[Tensor]:
    for item in source:
        image = item[0] if isinstance(item, (tuple, list)) else item
        if not isinstance(image, Tensor) or image.ndim not in (3, 4):
            shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise UsageError(f"images are tensors [C, H, W] or batches [N, C, H, W]; got {shape}")
        if not image.is_floating_point():
            raise UsageError(f"images are normalised floating-point tensors; got {image.dtype}")
        yield from (image.detach() if image.ndim == 4 else [image.detach()])


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names and bytes of the state dict."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
