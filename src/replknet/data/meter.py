"""How fast pictures pass, and how much of the time is spent waiting for them."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Throughput:
    """Pictures per second of this process, and the share of the time in which it waited for the loader."""

    images: int
    seconds: float
    waiting: float

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds > 0 else 0.0

    @property
    def wait_share(self) -> float:
        """0: the loader was always ahead; 1: nothing was done but wait."""
        return self.waiting / self.seconds if self.seconds > 0 else 0.0


class ThroughputMeter:
    """Call `batch_arrived(n)` when a batch is there and `batch_done()` when its work is finished.

    Time from `batch_done` to the next `batch_arrived` is waiting; the time from the first call is the whole. Work on a
    GPU runs on while Python returns: call `batch_done` after something that waits for it, or read the share as "the
    loader was late", which is what matters.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        self._begin = self._mark = self._clock()
        self._images, self._waiting = 0, 0.0

    def batch_arrived(self, images: int) -> None:
        now = self._clock()
        self._waiting += now - self._mark
        self._mark = now
        self._images += images

    def batch_done(self) -> None:
        self._mark = self._clock()

    def result(self) -> Throughput:
        return Throughput(self._images, self._clock() - self._begin, self._waiting)

    def iterate(self, loader: Iterable[T], size: Callable[[T], int]) -> Iterator[T]:
        """Pass the batches of a loader through, metering it; `size` tells the pictures of a batch."""
        self.reset()
        for batch in loader:
            self.batch_arrived(size(batch))
            yield batch
            self.batch_done()
