"""Tar shards of real pictures: every one once, in a repeatable order, from any place on."""

import io
import json
import random
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from replknet._errors import RunError, UsageError
from replknet.data import IGNORE, Augmentation, BrokenImageError, ImageFormat, evaluation_transform, training_transform
from replknet.data.streams import ShardSet, StreamSamples, find_shards

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    # Three workers are the point here, whatever the machine has.
    pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes:UserWarning"),
]
IMAGE = ImageFormat(size=16, mean=(0,), std=(1,))


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write_shards(folder: Path, photographs, counts, *, label="cls") -> list[Path]:
    """Shards whose pictures have their number as the label."""
    folder.mkdir(parents=True, exist_ok=True)
    number, shards = 0, []
    for shard, count in enumerate(counts):
        shards.append(folder / f"train-{shard:03d}.tar")
        with tarfile.open(shards[-1], "w") as archive:
            for _ in range(count):
                buffer = io.BytesIO()
                photographs[0].crop((number, 0, number + 20, 20)).save(buffer, "JPEG")
                add(archive, f"pictures/{number:05d}.jpg", buffer.getvalue())
                text = str(number) if label == "cls" else json.dumps({label: number})
                add(archive, f"pictures/{number:05d}.{'cls' if label == 'cls' else 'json'}", text.encode())
                number += 1
    return shards


def stream(shards, *, batch_size=4, seed=None, workers=0, place=(0, 1), **options) -> StreamSamples:
    transform = training_transform(IMAGE, Augmentation()) if seed is not None else evaluation_transform(IMAGE)
    samples = StreamSamples(
        ShardSet(shards, shuffle_buffer=8),
        transform,
        IMAGE,
        batch_size=batch_size,
        seed=seed,
        workers=workers,
        **options,
    )
    samples.rank, samples.processes = place
    return samples


def labels(samples: StreamSamples, workers: int = 0) -> list[list[int]]:
    loader = DataLoader(samples, batch_size=samples.batch_size, num_workers=workers)
    return [batch.tolist() for _, batch in loader]


@pytest.mark.parametrize("counts", [[5, 7, 4], [16], [3, 3, 3, 3, 3, 3, 1]], ids=str)
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_every_picture_once(tmp_path, photographs, counts, processes, workers):
    shards = write_shards(tmp_path, photographs, counts)
    parts = [labels(stream(shards, workers=workers, place=(rank, processes)), workers) for rank in range(processes)]
    assert len({len(part) for part in parts}) == 1
    assert len(parts[0]) == stream(shards, workers=workers, place=(0, processes)).batches()
    flat = [label for part in parts for batch in part for label in batch if label != IGNORE]
    assert sorted(flat) == list(range(sum(counts)))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_training_epochs_are_repeatable_and_shuffled(tmp_path, photographs, workers):
    shards = write_shards(tmp_path, photographs, [9, 8, 8, 7])
    samples = stream(shards, seed=1, workers=workers)
    epochs = []
    for epoch in (0, 1, 0):
        samples.set_epoch(epoch)
        epochs.append(labels(samples, workers))
        assert len(epochs[-1]) == 32 // 4
    assert epochs[0] == epochs[2] != epochs[1]
    flat = [label for batch in epochs[0] for label in batch]
    assert flat != sorted(flat)
    if workers == 0:
        assert sorted(flat) == list(range(32))


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("start", [1, 3, 7])
def test_training_continues_in_mid_epoch(tmp_path, photographs, workers, start):
    shards = write_shards(tmp_path, photographs, [9, 8, 8, 7])
    samples = stream(shards, seed=1, workers=workers)
    samples.set_epoch(2)
    loader = DataLoader(samples, batch_size=4, num_workers=workers)
    whole = list(loader)
    samples.set_epoch(2, start)
    rest = list(loader)
    assert len(rest) == len(whole) - start
    for (images, numbers), (wanted, wanted_numbers) in zip(rest, whole[start:], strict=True):
        assert torch.equal(images, wanted)
        assert torch.equal(numbers, wanted_numbers)


def test_living_workers_see_a_new_epoch(tmp_path, photographs):
    samples = stream(write_shards(tmp_path, photographs, [9, 8]), seed=1, workers=1)
    loader = DataLoader(samples, batch_size=4, num_workers=1, persistent_workers=True)
    first = [batch.tolist() for _, batch in loader]
    samples.set_epoch(1)
    assert [batch.tolist() for _, batch in loader] != first


def test_processes_share_the_shards(tmp_path, photographs):
    shards = write_shards(tmp_path, photographs, [8, 8, 8, 8])
    parts = [labels(stream(shards, seed=1, place=(rank, 2))) for rank in range(2)]
    assert [len(part) for part in parts] == [4, 4]
    seen = [{label for batch in part for label in batch} for part in parts]
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == set(range(32))


@pytest.mark.parametrize("seed", [None, 3])
def test_broken_members_are_named_and_skipped(tmp_path, photographs, seed):
    shards = write_shards(tmp_path, photographs, [8])
    with tarfile.open(shards[0], "a") as archive:
        add(archive, "bad.jpg", b"no picture")
        add(archive, "bad.cls", b"77")
        add(archive, "orphan.txt", b"")
    samples = stream(shards, seed=seed, broken="skip")
    flat = [label for batch in labels(samples) for label in batch]
    assert sorted(label for label in flat if label != IGNORE) == list(range(8))
    assert len(samples) == (8 if seed is not None else 12)
    assert any("train-000.tar:bad.jpg" in message for message in samples.report.messages())
    with pytest.raises(BrokenImageError, match=r"train-000\.tar:bad\.jpg"):
        labels(stream(shards, seed=seed))


def test_labels_in_json_and_wrong_labels(tmp_path, photographs):
    shards = write_shards(tmp_path, photographs, [3], label="label")
    assert labels(stream(shards)) == [[0, 1, 2]]
    other = write_shards(tmp_path / "other", photographs, [3], label="class")
    with pytest.raises(RunError, match="label is not a class index"):
        labels(stream(other))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_same(tmp_path, photographs):
    # webdataset leaves its files to the garbage collector.
    wds = pytest.importorskip("webdataset", reason="needs the package webdataset")
    shards = write_shards(tmp_path, photographs, [5, 3])
    theirs = wds.WebDataset([str(shard) for shard in shards], shardshuffle=False).decode("pil").to_tuple("jpg", "cls")
    ours = list(ShardSet(shards).read(0, 1, 3, None))
    for (picture, label), (_, mine, number) in zip(theirs, ours, strict=True):
        assert label == number
        assert picture.tobytes() == mine.tobytes()


def test_shards_are_found(tmp_path, photographs):
    shards = write_shards(tmp_path / "set", photographs, [1, 1, 1])
    assert find_shards(str(tmp_path / "set"), "train") == shards
    assert find_shards(str(tmp_path / "set" / "train-{000..002}.tar"), "train") == shards
    assert find_shards(str(shards[1]), "train") == [shards[1]]
    with pytest.raises(UsageError, match="validation split"):
        find_shards(str(tmp_path / "set"), "validation")
    with pytest.raises(UsageError, match=r"train-003\.tar: no such shard"):
        find_shards(str(tmp_path / "set" / "train-{000..003}.tar"), "train")
    val = write_shards(tmp_path / "set" / "val", photographs, [1])
    assert find_shards(str(tmp_path / "set"), "validation") == val


@pytest.mark.parametrize("data", [b"", b"no tar file at all" * 100])
def test_files_that_are_no_shards_are_named(tmp_path, data):
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(UsageError, match=r"x\.tar"):
        ShardSet([tmp_path / "x.tar"])


def test_a_cut_shard_is_named(tmp_path, photographs):
    shard = write_shards(tmp_path, photographs, [20])[0]
    shard.write_bytes(shard.read_bytes()[:6000])
    with pytest.raises((UsageError, RunError), match=r"train-000\.tar"):
        labels(stream([shard]))


def test_order_is_the_random_generators(tmp_path, photographs):
    shards = ShardSet(write_shards(tmp_path, photographs, [6, 6]), shuffle_buffer=4)
    orders = [[label for *_, label in shards.read(0, 1, 3, random.Random(seed))] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert isinstance(next(shards.read(0, 1, 1, None))[1], Image.Image)
