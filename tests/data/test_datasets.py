"""Source strings."""

import pickle

import numpy as np
import pytest
from PIL import Image

from replknet._errors import UsageError
from replknet.data import open_dataset
from replknet.data.embedded import DigitsSet


def test_digits_are_all_there_once_and_always_the_same():
    train, validation = open_dataset("digits", split="train"), open_dataset("digits", split="validation")
    assert isinstance(train, DigitsSet)
    assert isinstance(validation, DigitsSet)
    assert (len(train), len(validation)) == (1437, 360)
    names = {train.name(index) for index in range(len(train))} | {validation.name(index) for index in range(360)}
    assert len(names) == 1797
    assert np.bincount(validation.labels).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    picture, label = validation.read(7, 1)
    assert (picture.size, picture.mode, label) == ((8, 8), "L", int(validation.labels[7]))
    assert picture.getextrema()[1] == 255
    with pytest.raises(UsageError, match="train and validation"):
        open_dataset("digits", split="test")


def test_digits_as_a_folder(tmp_path):
    validation = DigitsSet("validation")
    validation.save(tmp_path)
    folder = open_dataset(str(tmp_path), split="validation")
    assert len(folder) == 360
    assert folder.class_names == validation.class_names


@pytest.mark.parametrize("train", [True, False])
def test_torchvision_cifar10_from_its_own_files(tmp_path, monkeypatch, train):
    generator = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = generator.integers(0, 256, (20, 3072), dtype=np.uint8)
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [index % 10 for index in range(20)]}))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    images = open_dataset("torch/cifar10", split="train" if train else "validation", root=tmp_path)
    assert len(images) == (100 if train else 20)
    assert images.class_names == names
    picture, label = images.read(13, 3)
    assert label == 3
    assert np.array_equal(np.asarray(picture), pixels[13].reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torch/cifar10", "allow its download"),
        ("torch/nonsense", "torch/cifar100"),
        ("/absent/folder", "no such data"),
        ("digitz", "no such data"),
        ("wds//absent/shard-{000..003}.tar", "no such shard"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, source, message):
    with pytest.raises(UsageError, match=message) as caught:
        open_dataset(source, root=tmp_path if source.startswith("torch") else None)
    assert source.removeprefix("wds/").split("{")[0] in str(caught.value)


@pytest.mark.parametrize("scheme", ["hfds", "hfids", "tfds", "wds"])
def test_a_missing_package_is_named(monkeypatch, scheme):
    module = {"hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow_datasets", "wds": "webdataset"}[scheme]
    monkeypatch.setitem(__import__("sys").modules, module, None)
    for reader in ("hfds", "hfids", "tfds", "wds"):
        monkeypatch.delitem(__import__("sys").modules, f"timm.data.readers.reader_{reader}", raising=False)
    name = "https://host/shard-{000..003}.tar" if scheme == "wds" else "name"
    with pytest.raises(UsageError, match=r"pip install \w+"):
        open_dataset(f"{scheme}/{name}", split="train", num_samples=10)


def test_hugging_face_sets_from_a_folder(tmp_path, write_classes, monkeypatch):
    pytest.importorskip("datasets", reason="needs the package datasets")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    root = write_classes(tmp_path / "set" / "train", {"ant": 3, "bee": 2}).parent
    images = open_dataset(f"hfds/{root}", split="train", root=tmp_path / "cache")
    assert len(images) == 5
    assert images.class_names == ["ant", "bee"]
    assert [images.read(index, 3)[1] for index in range(5)] == [0, 0, 0, 1, 1]
    stream = open_dataset(f"hfids/{root}", split="train", root=tmp_path / "cache", training=False, num_samples=5)
    read = list(stream.read(0, 1, 3, None))
    assert sorted(label for _, _, label in read) == [0, 0, 0, 1, 1]
    assert all(isinstance(picture, Image.Image) for _, picture, _ in read)
    # The set's only other split is called "test".
    write_classes(root / "test", {"ant": 1, "bee": 1})
    validation = open_dataset(f"hfds/{root}", split="validation", root=tmp_path / "cache2")
    assert len(validation) == 2
    with pytest.raises(UsageError, match="cannot be opened"):
        open_dataset(f"hfds/{root}", split="holdout", root=tmp_path / "cache2")
