"""Seeded augmentation and broken pictures."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from replknet.data import IGNORE, Augmentation, BrokenImageError, ImageFormat, evaluation_transform, training_transform
from replknet.data.folders import FolderSet
from replknet.data.sampler import PADDING, SampleKey, StatefulDistributedSampler
from replknet.data.samples import Samples, seeded

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
IMAGE = ImageFormat(size=40)


@pytest.fixture
def folder(tmp_path, write_classes) -> FolderSet:
    return FolderSet(write_classes(tmp_path / "set", {"a": 6, "b": 6}))


def training_samples(folder, **options) -> Samples:
    return Samples(folder, training_transform(IMAGE, Augmentation()), IMAGE, seed=7, **options)


def epoch_of(samples, workers, epoch, start=0):
    sampler = StatefulDistributedSampler(len(samples), seed=7)
    sampler.load_state_dict({"epoch": epoch, "start": start})
    return list(DataLoader(samples, batch_size=3, sampler=sampler, num_workers=workers))


def test_augmentation_does_not_depend_on_workers_or_interruption(folder):
    samples = training_samples(folder)
    alone = epoch_of(samples, 0, 1)
    for workers, start in ((1, 0), (2, 0), (2, 6), (0, 9)):
        other = epoch_of(samples, workers, 1, start)
        assert len(other) == 4 - start // 3
        for (images, labels), (wanted, wanted_labels) in zip(other, alone[start // 3 :], strict=True):
            assert torch.equal(images, wanted)
            assert torch.equal(labels, wanted_labels)
    assert not torch.equal(epoch_of(samples, 0, 2)[0][0], alone[0][0])


def test_epochs_and_samples_look_different(folder):
    samples = training_samples(folder)
    assert not torch.equal(samples[SampleKey(0, 3)][0], samples[SampleKey(1, 3)][0])
    assert torch.equal(samples[SampleKey(1, 3)][0], samples[SampleKey(1, 3)][0])


def test_global_random_states_are_left_alone(folder):
    samples = training_samples(folder)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    wanted = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    samples[0]
    assert (random.random(), np.random.rand(), torch.rand(1)) == wanted
    with pytest.raises(ZeroDivisionError), seeded(3):
        _ = 1 / 0
    assert torch.rand(1) != wanted[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_pictures_are_named_counted_and_skipped(folder, workers):
    (folder.root / "a" / "002.png").write_bytes(b"")
    (folder.root / "b" / "001.png").write_bytes(b"text")
    samples = Samples(folder, evaluation_transform(IMAGE), IMAGE, broken="skip")
    labels = torch.cat([labels for _, labels in DataLoader(samples, batch_size=5, num_workers=workers)])
    assert labels.tolist() == [0, 0, IGNORE, 0, 0, 0, 1, IGNORE, 1, 1, 1, 1]
    assert len(samples.report) == 2
    assert any("a/002.png: the file is empty" in message for message in samples.report.messages())
    # A second pass names them again, and counts them once.
    list(DataLoader(samples, batch_size=5))
    assert len(samples.report) == 2


def test_training_takes_the_next_readable_picture(folder):
    (folder.root / "a" / "005.png").write_bytes(b"")
    samples = training_samples(folder, broken="skip")
    assert samples[SampleKey(0, 5)][1] == 1
    with pytest.raises(BrokenImageError, match=r"a/005\.png"):
        training_samples(folder)[SampleKey(0, 5)]


def test_a_folder_of_broken_pictures_ends(folder):
    for index in range(len(folder)):
        with open(folder.name(index), "wb"):
            pass
    with pytest.raises(BrokenImageError, match="in a row"):
        training_samples(folder, broken="skip")[0]


def test_fatal_is_an_error_in_a_worker_too(folder):
    (folder.root / "a" / "002.png").write_bytes(b"")
    samples = Samples(folder, evaluation_transform(IMAGE), IMAGE)
    with pytest.raises(BrokenImageError, match=r"^cannot read .*a/002\.png: the file is empty$"):
        list(DataLoader(samples, batch_size=5, num_workers=1))


def test_padding_is_blank_and_ignored(folder):
    tensor, label = Samples(folder, evaluation_transform(IMAGE), IMAGE)[SampleKey(0, PADDING)]
    assert tensor.shape == (3, 40, 40)
    assert label == IGNORE


def test_targets_are_mapped(folder):
    samples = Samples(folder, evaluation_transform(IMAGE), IMAGE, targets=[7, 300], with_index=True)
    assert [samples[index][1:] for index in (0, 11)] == [(7, 0), (300, 11)]
