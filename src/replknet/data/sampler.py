"""Orders of samples: exact to resume in training, exact to count in evaluation."""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler

from replknet._errors import UsageError

# The index of a padding sample: evaluation gives every process the same number of batches, and counts none of these.
PADDING = -1


class SampleKey(NamedTuple):
    """What a sampler yields and a data set takes: with the epoch in it, no state has to reach the workers."""

    epoch: int
    index: int


def world() -> tuple[int, int]:
    """(rank, number of processes) of torch.distributed; (0, 1) where it is not in use."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def mix_seed(*parts: int) -> int:
    """A 63-bit seed that is a fixed function of the integers, the same on every machine and Python version."""
    digest = hashlib.blake2b(",".join(str(int(part)) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class StatefulDistributedSampler(DistributedSampler):
    """Training order: a pure function of (seed, epoch), shared by all processes, that can start anywhere.

    Process r of w takes every w-th sample of the shuffled list, so that the k-th global batch holds the same samples
    at any number of processes. The incomplete rest that does not fill all processes is dropped.

    `start` counts samples of the epoch over all processes that have been consumed; it belongs to `epoch` alone and
    falls back to 0 when `set_epoch` moves on. Lightning keeps its hands off since this is a DistributedSampler.
    """

    def __init__(
        self, length: int, *, seed: int = 0, shuffle: bool = True, rank: int | None = None, size: int | None = None
    ):
        default_rank, default_size = world()
        self.num_replicas = default_size if size is None else size
        self.rank = default_rank if rank is None else rank
        if not 0 <= self.rank < self.num_replicas:
            raise ValueError(f"rank {self.rank} of {self.num_replicas} processes: give 0 <= rank < processes")
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self.epoch, self.start = 0, 0
        self.drop_last = True
        self.num_samples = length // self.num_replicas
        self.total_size = self.num_samples * self.num_replicas

    def __iter__(self) -> Iterator[SampleKey]:  # type: ignore[override]
        for index in self.order()[self.start + self.rank : self.total_size : self.num_replicas]:
            yield SampleKey(self.epoch, index)

    def __len__(self) -> int:
        """Samples of a whole epoch on this process, whatever `start` is: schedules count whole epochs."""
        return self.num_samples

    def order(self) -> list[int]:
        """The epoch's whole list of sample indices, the same on every process."""
        if not self.shuffle:
            return list(range(self.length))
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        return torch.randperm(self.length, generator=generator).tolist()

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "length": self.length, "epoch": self.epoch, "start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at `state`: {"seed", "length", "epoch", "start"}; start must be a multiple of the process count."""
        for name in ("seed", "length"):
            if name in state and state[name] != getattr(self, name):
                raise UsageError(
                    f"cannot resume in the middle of an epoch: {name} was {state[name]} and is now "
                    f"{getattr(self, name)}; use the same data set and seed"
                )
        if state["start"] % self.num_replicas:
            raise UsageError(
                f"cannot resume in the middle of an epoch: {state['start']} samples are done, "
                f"which {self.num_replicas} processes do not divide"
            )
        self.epoch, self.start = state["epoch"], state["start"]


class EvaluationSampler(DistributedSampler):
    """Every sample once, in order, over all processes; shorter shares are filled up with `PADDING`.

    All processes see the same number of batches (an uneven number would hang a wrapper that communicates in forward),
    and the padding carries the target `IGNORE`, so that nothing is counted twice.
    """

    def __init__(self, length: int, *, rank: int | None = None, size: int | None = None):
        default_rank, default_size = world()
        self.num_replicas = default_size if size is None else size
        self.rank = default_rank if rank is None else rank
        self.length, self.epoch, self.shuffle, self.drop_last = length, 0, False, False
        self.num_samples = -(-length // self.num_replicas)
        self.total_size = self.num_samples * self.num_replicas

    def __iter__(self) -> Iterator[SampleKey]:  # type: ignore[override]
        for position in range(self.rank, self.total_size, self.num_replicas):
            yield SampleKey(0, position if position < self.length else PADDING)

    def __len__(self) -> int:
        return self.num_samples
