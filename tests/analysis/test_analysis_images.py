"""Images for analyses: order, sizes, broken files, and sources of every kind."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from replknet._errors import RunError, UsageError
from replknet.analysis.images import NoiseImages, PreparedImages, open_pictures


@pytest.fixture
def folder(tmp_path):
    """Three classes of 4, 2 and 1 pictures of differing sizes and modes, and a text file."""
    random = np.random.default_rng(0)
    for name, count in {"ant": 4, "bee": 2, "cow": 1}.items():
        (tmp_path / name / "deep").mkdir(parents=True)
        for index in range(count):
            pixels = random.integers(0, 255, (20 + index, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / "deep" / f"{index}.png")
    Image.new("L", (9, 9), 77).save(tmp_path / "cow" / "grey.png")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_prepared_as_the_releases_script(folder):
    images = PreparedImages(open_pictures(str(folder)), (32, 32), seed=None)
    steps = [transforms.Resize((32, 32), interpolation=Image.Resampling.BICUBIC), transforms.ToTensor()]
    release = transforms.Compose([*steps, transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    got = list(images)
    assert images.used[0] == "ant/deep/0.png"
    with Image.open(folder / images.used[0]) as picture:
        assert torch.allclose(got[0], release(picture.convert("RGB")), atol=1e-6)
    assert len(got) == len(images) == 8


def test_seeds_take_classes_in_turn_and_repeat(folder):
    pictures = open_pictures(str(folder))
    first, again, other = (PreparedImages(pictures, (8, 8), seed=seed) for seed in (1, 1, 2))
    for images in (first, again, other):
        list(images)
    assert first.used == again.used
    assert first.used != other.used
    assert sorted(first.used) == sorted(other.used)
    assert {name.split("/")[0] for name in first.used[:3]} == {"ant", "bee", "cow"}
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert PreparedImages(pictures, (8, 9), seed=1).fingerprint != first.fingerprint


def test_height_and_width_are_not_confused(folder):
    images = PreparedImages(open_pictures(str(folder)), (16, 24), seed=None)
    assert {tuple(image.shape) for image in images} == {(3, 16, 24)}
    assert images.picture("ant/deep/1.png").shape == (16, 24, 3)


def test_broken_pictures_are_named_and_left_out(folder, caplog):
    (folder / "ant" / "deep" / "1.png").write_bytes((folder / "ant" / "deep" / "1.png").read_bytes()[:60])
    (folder / "bee" / "empty.jpg").touch()
    images = PreparedImages(open_pictures(str(folder)), (8, 8))
    assert len(list(images)) == 7
    assert len(images.unreadable) == 2
    assert "empty.jpg" in caplog.text
    assert not {"ant/deep/1.png", "bee/empty.jpg"} & set(images.used)


def test_broken_pictures_stop_where_that_is_asked_for(folder):
    (folder / "bee" / "empty.jpg").touch()
    with pytest.raises(RunError, match=r"empty\.jpg"):
        list(PreparedImages(open_pictures(str(folder)), (8, 8), broken="fatal"))


def test_stopping_early_leaves_no_thread_waiting(folder):
    images = PreparedImages(open_pictures(str(folder)), (8, 8))
    for _ in images:
        break
    assert len(images.used) == 1


def test_grey_networks(folder):
    images = PreparedImages(open_pictures(str(folder)), (8, 8), in_chans=1)
    assert {tuple(image.shape) for image in images} == {(1, 8, 8)}


def test_networks_of_other_channels(folder):
    with pytest.raises(UsageError, match="takes 4; use noise"):
        PreparedImages(open_pictures(str(folder)), (8, 8), in_chans=4)


def test_flat_folders_and_odd_names(tmp_path):
    for name in ("é.png", "b c.PNG", "日本.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    images = PreparedImages(open_pictures(str(tmp_path)), (4, 4))
    list(images)
    assert sorted(images.used) == sorted(["é.png", "b c.PNG", "日本.jpg"])
    assert len(images.fingerprint) == 64


def test_data_sets_are_shuffled_over_classes_too():
    pictures = open_pictures("digits")
    labels = {pictures.name(index): int(pictures.labels[index]) for index in range(len(pictures))}
    images = PreparedImages(pictures, (16, 16))
    for _, _ in zip(images, range(9), strict=False):
        pass
    assert sorted(labels[name] for name in images.used) == list(range(10))


def test_noise_repeats_by_seed_and_index():
    first, longer = list(NoiseImages((8, 6), n=2, seed=3)), list(NoiseImages((8, 6), n=4, seed=3))
    assert all(torch.equal(a, b) for a, b in zip(first, longer, strict=False))
    assert first[0].shape == (3, 8, 6)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], next(iter(NoiseImages((8, 6), n=1, seed=4))))


def test_missing_and_empty(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        open_pictures(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="no pictures"):
        open_pictures(str(tmp_path))
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(UsageError, match="folder of pictures was expected"):
        open_pictures(str(tmp_path / "file.txt"))
