"""Transforms against plain PIL and NumPy."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from replknet._errors import UsageError
from replknet.data import Augmentation, ImageFormat, evaluation_transform, training_transform
from replknet.data.samples import seeded
from replknet.data.transforms import IMAGENET_MEAN, IMAGENET_STD, DeviceTransform


def expected(picture: Image.Image, size: int, mean, std) -> torch.Tensor:
    """The release's rule, written out with PIL and NumPy alone."""
    if size >= 384:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    else:
        short, (width, height) = int(size / 0.875), picture.size
        if width <= height:
            picture = picture.resize((short, int(short * height / width)), Image.Resampling.BICUBIC)
        else:
            picture = picture.resize((int(short * width / height), short), Image.Resampling.BICUBIC)
        left, top = round((picture.width - size) / 2), round((picture.height - size) / 2)
        picture = picture.crop((left, top, left + size, top + size))
    pixels = np.asarray(picture).astype(np.float64) / 255
    return torch.from_numpy((pixels - np.array(mean)) / np.array(std)).permute(2, 0, 1)


@pytest.mark.parametrize("size", [64, 160, 224, 320, 383, 384, 512])
@pytest.mark.parametrize("shape", [(640, 427), (427, 640), (300, 300), (500, 73), (31, 29)], ids=str)
def test_evaluation_matches_plain_pil(photographs, size, shape):
    picture = photographs[0].resize(shape)
    for mean, std in ((IMAGENET_MEAN, IMAGENET_STD), ((0.5,) * 3, (0.5,) * 3)):
        got = evaluation_transform(ImageFormat(size=size, mean=mean, std=std))(picture)
        want = expected(picture, size, mean, std)
        assert got.dtype == torch.float32
        assert got.shape == want.shape
        assert (got.double() - want).abs().max() < 2e-6


def test_evaluation_short_side_is_int_of_size_over_0875():
    # 225 / 0.875 = 257.14: the short side becomes 257, not 258.
    steps = evaluation_transform(ImageFormat(size=225)).transforms  # type: ignore[attr-defined]
    assert steps[0].size == math.floor(225 / 0.875)


def test_small_pictures_of_the_right_size_stay_as_they_are(photographs):
    picture = photographs[0].resize((32, 32))
    got = evaluation_transform(ImageFormat(size=32, mean=(0,), std=(1,)))(picture)
    assert torch.equal((got * 255).round().to(torch.uint8), torch.from_numpy(np.array(picture)).permute(2, 0, 1))


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1)], ids=str)
@pytest.mark.parametrize("target", [28, 224, 384])
def test_pictures_of_one_pixel(size, target):
    picture = Image.new("RGB", size, (255, 0, 0))
    for transform in (
        evaluation_transform(ImageFormat(size=target)),
        training_transform(ImageFormat(size=target), Augmentation()),
    ):
        assert transform(picture).shape == (3, target, target)


@pytest.mark.parametrize("chans", [1, 3])
@pytest.mark.parametrize("size", [32, 64])
def test_device_normalisation_equals_the_workers(photographs, chans, size):
    image = ImageFormat(size=size, mean=(0.4,), std=(0.3,), in_chans=chans)
    picture = photographs[1] if chans == 3 else photographs[1].convert("L")
    on_worker = evaluation_transform(image)(picture)
    raw = evaluation_transform(image, normalize=False)(picture)
    assert raw.dtype == torch.uint8
    batch = raw[None].contiguous(memory_format=torch.channels_last)
    got = DeviceTransform(image)(batch)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert (got[0] - on_worker).abs().max() < 2e-6


def test_device_erasing_is_in_training_only(photographs):
    image = ImageFormat(size=64)
    raw = evaluation_transform(image, normalize=False)(photographs[0])[None]
    device = DeviceTransform(image, erasing=1.0)
    assert torch.equal(device(raw), DeviceTransform(image)(raw))
    with seeded(3):
        erased = device(raw, training=True)
    changed = (erased != device(raw)).any(1).float().mean()
    assert 0.01 < changed < 0.5


def test_training_transform_is_the_recipe():
    text = repr(training_transform(ImageFormat(size=224), Augmentation()))
    assert "RandomResizedCropAndInterpolation(size=(224, 224), scale=(0.08, 1.0)" in text
    assert "interpolation=PIL.Image.BICUBIC" in text or "interpolation=bicubic" in text
    assert "RandAugment(n=2" in text
    assert "RandomErasing(p=0.25, mode=pixel, count=(1, 1))" in text
    # Colour jitter is off beside RandAugment, on without it: timm's rule, and the release's.
    assert "ColorJitter" not in text
    assert "ColorJitter" in repr(training_transform(ImageFormat(size=224), Augmentation(auto_augment=None)))


def test_small_training_crops_are_shifts(photographs):
    picture = photographs[0].resize((32, 32))
    plain = Augmentation(auto_augment=None, color_jitter=0, erasing=0, hflip=0)
    image = ImageFormat(size=32, mean=(0,), std=(1,))
    whole = evaluation_transform(image)(picture)
    transform = training_transform(image, plain)
    padded = torch.nn.functional.pad(whole, (4, 4, 4, 4))
    windows = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    seen = set()
    for seed in range(30):
        with seeded(seed):
            got = transform(picture)
        seen.add(next(number for number, window in enumerate(windows) if torch.equal(got, window)))
    assert len(seen) > 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "image size 0"),
        ({"in_chans": 4}, "in_chans 4"),
        ({"mean": (0.5, 0.5)}, "give 1 or 3 values"),
        ({"std": (0.0,)}, "above 0"),
        ({"crop_pct": 1.5}, "crop_pct 1.5"),
    ],
    ids=str,
)
def test_wrong_formats_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        ImageFormat(**options)


@pytest.mark.parametrize("chans", [1, 3])
def test_every_augmentation_runs_at_full_strength(photographs, chans):
    # Full strength of "posterize" is 0 bits, which Pillow 13 refuses.
    picture = photographs[0].resize((64, 48)).convert("RGB" if chans == 3 else "L")
    transform = training_transform(ImageFormat(size=40, in_chans=chans), Augmentation())
    (augment,) = (step for step in transform.transforms if hasattr(step, "ops"))  # type: ignore[attr-defined]
    for operation in augment.ops:
        for operation.prob, operation.magnitude_std, operation.magnitude in ((1, 0, 10), (1, 0, 0)):
            changed = operation(picture)
            assert (changed.size, changed.mode) == (picture.size, picture.mode), operation
            if "Posterize" in operation.name and operation.magnitude == 10:
                assert np.asarray(changed).max() == 0
