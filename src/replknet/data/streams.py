"""Pictures that come in order and not by number: tar shards (WebDataset) and timm's streaming readers.

Shards on a disk are read with the standard library alone. They need no index file: their members are counted once from
the tar headers, and every process and worker reads its own shards from front to back.
"""

import itertools
import json
import logging
import os
import random
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from replknet._errors import RunError, UsageError
from replknet.data.folders import SPLIT_FOLDERS
from replknet.data.images import BrokenImageError, is_image_name, load_image
from replknet.data.sampler import mix_seed, world
from replknet.data.samples import IGNORE, Broken, BrokenReport, seeded
from replknet.data.transforms import ImageFormat, Transform

_logger = logging.getLogger(__name__)


class Share(Protocol):
    """One worker's part of a stream: which of how many, counted over all processes."""

    worker: int
    workers: int


class ImageStream(Protocol):
    """A collection of labelled pictures that is read from front to back."""

    class_names: list[str] | None

    def __len__(self) -> int:
        """Pictures in all shards."""
        ...

    def share_length(self, worker: int, workers: int) -> int:
        """Pictures that worker `worker` of `workers` reads in one pass."""
        ...

    def read(self, worker: int, workers: int, in_chans: int, order: random.Random | None, lap: int = 0) -> Iterator:
        """One pass: (name, picture or BrokenImageError, class index), shuffled by `order` if given.

        `lap` numbers the pass, the same for all workers; `order` is this worker's own.
        """
        ...


class ShardSet:
    """WebDataset shards: members `KEY.jpg` (or another picture suffix) and `KEY.cls`, or `KEY.json` with a label.

    Worker w of W reads the shards w, w+W, ...; where there are more workers than shards, those that meet in one shard
    take turns. One pass reads every picture once at any number of processes and workers.

    Args:
        shards: tar files.
        num_samples: pictures in all of them, if known; else counted from the headers.
        label_key: field of the JSON member that holds the class index.
        shuffle_buffer: pictures (still compressed) among which a training pass draws.
    """

    class_names: list[str] | None = None

    def __init__(self, shards: list[Path], *, label_key: str = "label", shuffle_buffer: int = 1024):
        if not shards:
            raise UsageError("no tar shards were given")
        self.shards, self.label_key, self.shuffle_buffer = shards, label_key, shuffle_buffer
        self.counts = [_count(shard) for shard in shards]
        if not sum(self.counts):
            raise UsageError(
                f"{shards[0]}: no labelled pictures in its {len(shards)} shard(s); expected KEY.jpg and KEY.cls"
            )

    def __len__(self) -> int:
        return sum(self.counts)

    def share_length(self, worker: int, workers: int) -> int:
        count = len(self.shards)
        if workers <= count:
            return sum(self.counts[worker::workers])
        turn, turns = _turn(worker, workers, count)
        return len(range(turn, self.counts[worker % count], turns))

    def read(self, worker: int, workers: int, in_chans: int, order: random.Random | None, lap: int = 0) -> Iterator:
        count = len(self.shards)
        mine = list(range(worker % count, count, workers))
        turn, turns = _turn(worker, workers, count)
        if order is not None:
            order.shuffle(mine)
        samples = itertools.chain.from_iterable(
            itertools.islice(_members(self.shards[shard], self.label_key), turn, None, turns) for shard in mine
        )
        for name, data, label in _shuffled(samples, self.shuffle_buffer, order):
            try:
                yield name, load_image(data, in_chans=in_chans, name=name), label
            except BrokenImageError as error:
                yield name, error, label


class ReaderStream:
    """A streaming reader of timm (`hfids/`, `tfds/`, remote `wds/`); the reader shares out shards by itself.

    A worker's part is not known before it has been read, so evaluation cannot be filled up to equal lengths.
    """

    def __init__(self, reader, name: str):
        self.reader, self._name = reader, name
        classes = getattr(reader, "class_to_idx", None) or {}
        self.class_names = sorted(classes, key=classes.__getitem__) if classes else None
        self.length = int(reader.num_samples)

    def __len__(self) -> int:
        return self.length

    def share_length(self, worker: int, workers: int) -> int:
        return -(-self.length // workers)

    def read(self, worker: int, workers: int, in_chans: int, order: random.Random | None, lap: int = 0) -> Iterator:
        if order is not None:
            # The same number everywhere: the reader shuffles the shards by it before it shares them out.
            self.reader.set_epoch(lap)
        for number, (picture, label) in enumerate(self.reader):
            yield f"{self._name}[{worker}:{number}]", load_image(picture, in_chans=in_chans), int(label)


class StreamSamples(IterableDataset):
    """(tensor, class index) from a stream, for a DataLoader with the same `batch_size`.

    Training (`seed` given): an epoch has floor(pictures / (batch_size * processes)) batches on every process; a worker
    whose shards hold fewer starts them again. Order and augmentation are functions of (seed, epoch) and of the number
    of processes and workers; `set_epoch(epoch, start)` continues at batch `start` as if nothing had happened.

    Evaluation: every picture once; shards are filled up with `IGNORE` so that all processes see equally many batches.
    """

    def __init__(
        self,
        stream: ImageStream,
        transform: Transform,
        image: ImageFormat,
        *,
        batch_size: int,
        seed: int | None = None,
        broken: Broken = "fatal",
        targets: list[int] | None = None,
        workers: int = 0,
    ):
        self.stream, self.transform, self.image = stream, transform, image
        self.batch_size, self.seed, self.broken, self.targets = batch_size, seed, broken, targets
        self.workers = max(1, workers)
        self.rank, self.processes = world()
        self.report = BrokenReport()
        # Shared memory: workers that live on see a new epoch.
        self._position = torch.zeros(2, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The next pass is `epoch`, from batch `start` of this process on."""
        if start or epoch != int(self._position[0]):
            self._position[0], self._position[1] = epoch, start

    def batches(self) -> int:
        """Batches of a whole epoch on this process."""
        if self.seed is not None:
            return len(self.stream) // (self.batch_size * self.processes)
        return sum(self._evaluation_batches(worker) for worker in range(self.workers))

    def __len__(self) -> int:
        """Pictures of an epoch on this process, padding included: a DataLoader divides it into `batches()`."""
        return self.batches() * self.batch_size

    def __iter__(self) -> Iterator:
        info = get_worker_info()
        worker = info.id if info else 0
        epoch, start = (int(value) for value in self._position)
        if self.seed is None:
            return self._evaluate(worker)
        # A DataLoader asks its workers in turn, from the first: after a start in mid-epoch they change places.
        place = (worker + start) % self.workers
        skip = (start - place + self.workers - 1) // self.workers
        return self._train(place, epoch, skip)

    def _train(self, worker: int, epoch: int, skip: int) -> Iterator:
        place, seed = self._place(worker), self.seed or 0
        whole = (self.batches() - worker + self.workers - 1) // self.workers
        wanted = range(skip * self.batch_size, whole * self.batch_size)
        for number, (picture, label) in enumerate(itertools.islice(self._endless(place, epoch), wanted.stop)):
            if number in wanted:
                with seeded(mix_seed(seed, epoch, place, number)):
                    yield self.transform(picture), self._target(label)

    def _endless(self, place: int, epoch: int) -> Iterator[tuple[Image.Image, int]]:
        """Readable pictures of a worker's shards, pass after pass, each pass in another order."""
        for lap in itertools.count():
            found = 0
            order = random.Random(mix_seed(self.seed or 0, epoch, lap, place, self._places()))
            shared = mix_seed(self.seed or 0, epoch, lap) % 2**31
            for _, picture, label in self.stream.read(place, self._places(), self.image.in_chans, order, shared):
                if isinstance(picture, BrokenImageError):
                    self._broken(picture)
                    continue
                found += 1
                yield picture, label
            if not found:
                raise BrokenImageError("a worker found no readable picture in its part of a stream; use fewer workers")

    def _evaluate(self, worker: int) -> Iterator:
        done = 0
        for _, picture, label in self.stream.read(self._place(worker), self._places(), self.image.in_chans, None):
            done += 1
            if isinstance(picture, BrokenImageError):
                self._broken(picture)
                yield self._blank(), IGNORE
            else:
                yield self.transform(picture), self._target(label)
        for _ in range(done, self._evaluation_batches(worker) * self.batch_size if self.processes > 1 else done):
            yield self._blank(), IGNORE

    def _evaluation_batches(self, worker: int) -> int:
        places = [rank * self.workers + worker for rank in range(self.processes)]
        longest = max(self.stream.share_length(place, self._places()) for place in places)
        return -(-longest // self.batch_size)

    def _place(self, worker: int) -> int:
        return self.rank * self.workers + worker

    def _places(self) -> int:
        return self.processes * self.workers

    def _target(self, label: int) -> int:
        return label if self.targets is None else self.targets[label]

    def _broken(self, error: BrokenImageError) -> None:
        if self.broken == "fatal":
            raise error
        self.report.add(str(error))

    def _blank(self) -> torch.Tensor:
        grey = "RGB" if self.image.in_chans == 3 else "L"
        return torch.zeros_like(self.transform(Image.new(grey, (self.image.size, self.image.size))))


def find_shards(location: str, split: str) -> list[Path]:
    """Tar files of a folder (its `split` folder or names first), of one file, or of a `{000..012}` pattern."""
    path = Path(location)
    if path.is_file():
        return [path]
    if path.is_dir():
        names = SPLIT_FOLDERS.get(split, (split,))
        for name in names:
            if found := sorted((path / name).glob("*.tar")):
                return found
        everything = sorted(path.glob("*.tar"))
        known = {name for group in SPLIT_FOLDERS.values() for name in group}
        words = {file: set(re.split(r"[^a-z]+", file.stem.lower())) for file in everything}
        if any(words[file] & known for file in everything):
            everything = [file for file in everything if words[file] & set(names)]
        if everything:
            return everything
        raise UsageError(f"{location}: no tar shards of the {split} split in this folder")
    shards = [Path(name) for name in _expand(location)]
    if missing := [shard for shard in shards if not shard.is_file()]:
        raise UsageError(
            f"{missing[0]}: no such shard" + (f" ({len(missing)} are missing)" if len(missing) > 1 else "")
        )
    return shards


def _expand(pattern: str) -> list[str]:
    """`a-{008..010}.tar` → the three names."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    low, high = match.groups()
    head, tail = pattern[: match.start()], pattern[match.end() :]
    numbers = (f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1))
    return [name for number in numbers for name in _expand(f"{head}{number}{tail}")]


def _turn(worker: int, workers: int, shards: int) -> tuple[int, int]:
    """(which turn, of how many) a worker takes in its shard."""
    if workers <= shards:
        return 0, 1
    shard = worker % shards
    return worker // shards, len(range(shard, workers, shards))


def _split_key(name: str) -> tuple[str, str]:
    folder, base = os.path.split(name)
    key, _, suffix = base.partition(".")
    return os.path.join(folder, key), suffix.lower()


def _grouped(archive: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    members = (member for member in archive if member.isfile() and not os.path.basename(member.name).startswith("."))
    for key, group in itertools.groupby(members, key=lambda member: _split_key(member.name)[0]):
        yield key, {_split_key(member.name)[1]: member for member in group}


def _picture_suffix(suffixes: dict) -> str | None:
    return next((suffix for suffix in suffixes if is_image_name(f"x.{suffix}")), None)


def _count(shard: Path) -> int:
    try:
        with tarfile.open(shard) as archive:
            groups = (parts for _, parts in _grouped(archive))
            return sum(1 for parts in groups if _picture_suffix(parts) and ("cls" in parts or "json" in parts))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UsageError(f"{shard}: not a readable tar file ({error})") from error


def _members(shard: Path, label_key: str) -> Iterator[tuple[str, bytes, int]]:
    with tarfile.open(shard) as archive:
        for key, parts in _grouped(archive):
            suffix = _picture_suffix(parts)
            if suffix is None or not ("cls" in parts or "json" in parts):
                continue
            name = f"{shard}:{key}.{suffix}"
            data = _content(archive, parts[suffix])
            yield name, data, _label(archive, parts, name, label_key)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return file.read() if file else b""


def _label(archive: tarfile.TarFile, parts: dict[str, tarfile.TarInfo], name: str, label_key: str) -> int:
    raw = _content(archive, parts["cls"] if "cls" in parts else parts["json"])
    try:
        return int(raw) if "cls" in parts else int(json.loads(raw)[label_key])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{name}: its label is not a class index ({raw[:40]!r})") from error


def _shuffled(samples: Iterator, size: int, order: random.Random | None) -> Iterator:
    if order is None:
        yield from samples
        return
    buffer = list(itertools.islice(samples, size))
    for sample in samples:
        place = order.randrange(len(buffer))
        buffer[place], sample = sample, buffer[place]
        yield sample
    order.shuffle(buffer)
    yield from buffer
