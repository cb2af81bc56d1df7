"""Every kind of file that calls itself a picture."""

import io
import os

import numpy as np
import pytest
from PIL import Image, ImageDraw

from replknet.data.images import BrokenImageError, is_image_name, load_image


def encode(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_modes_become_rgb_and_grey(photographs, mode, tmp_path):
    picture = photographs[0].resize((40, 30)).convert(mode)
    path = tmp_path / "picture.tiff"
    if mode == "HSV":
        got = load_image(picture)
    else:
        picture.save(path)
        got = load_image(path)
    assert got.mode == "RGB"
    assert got.size == (40, 30)
    # HSV and indexed colours round; every other mode converts back to what PIL makes of it.
    assert np.abs(np.asarray(got).astype(int) - np.asarray(picture.convert("RGB")).astype(int)).max() <= 1
    assert load_image(picture, in_chans=1).mode == "L"


def test_transparent_palette_does_not_warn(photographs):
    picture = photographs[0].resize((40, 30)).convert("P")
    data = encode(picture, "PNG", transparency=bytes(range(256)))
    got = load_image(data)
    assert np.array_equal(np.asarray(got), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    values = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    got = np.asarray(load_image(encode(Image.fromarray(values), kind), in_chans=1)).astype(int)
    assert np.abs(got - values / 257).max() <= 1
    assert got.max() == 255


def test_cmyk_jpeg(photographs):
    picture = photographs[0].resize((64, 64)).convert("CMYK")
    got = load_image(encode(picture, "JPEG", quality=95))
    assert got.mode == "RGB"
    assert np.abs(np.asarray(got).astype(int) - np.asarray(picture.convert("RGB")).astype(int)).mean() < 6


def test_exif_orientation_is_ignored():
    picture = Image.new("RGB", (40, 20), "white")
    ImageDraw.Draw(picture).rectangle((0, 0, 9, 9), fill="black")
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to view"
    got = load_image(encode(picture, "JPEG", quality=95, exif=exif.tobytes()))
    assert got.size == (40, 20)
    assert np.asarray(got)[3, 3].max() < 40


def test_broken_files_are_named_with_a_reason(photographs, tmp_path):
    whole = encode(photographs[0], "JPEG")
    png = encode(photographs[0].resize((64, 64)), "PNG")
    cases = {
        "truncated.jpg": (whole[: len(whole) // 2], "truncated"),
        "empty.png": (b"", "the file is empty"),
        "text.jpg": (b"this is no picture", "not a picture in a known format"),
        "header.jpg": (whole[:20], "cannot read"),
        "flipped.png": (png[:60] + bytes([png[60] ^ 255]) + png[61:], "cannot read"),
        "cut.png": (png[: len(png) - 700], "cannot read"),
    }
    for name, (data, reason) in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        for source in (path, data):
            with pytest.raises(BrokenImageError, match=reason) as caught:
                load_image(source, name="" if source is path else str(path))
            assert name in str(caught.value)


def test_missing_folder_and_broken_link(tmp_path):
    with pytest.raises(BrokenImageError, match="no such file"):
        load_image(tmp_path / "absent.jpg")
    with pytest.raises(BrokenImageError, match="a folder"):
        load_image(tmp_path)
    os.symlink(tmp_path / "absent.jpg", tmp_path / "link.jpg")
    with pytest.raises(BrokenImageError, match="a broken link"):
        load_image(tmp_path / "link.jpg")


def test_float_pixels_are_refused():
    picture = Image.fromarray(np.ones((4, 4), np.float32))
    with pytest.raises(BrokenImageError, match="float"):
        load_image(encode(picture, "TIFF"))


def test_names():
    for name in ("a.JPEG", "b.Jpg", "c.png", "d.webp", "e.tar.png"):
        assert is_image_name(name)
    for name in (".hidden.jpg", "readme.txt", "jpg", "x.jpg.part", "._x.JPEG"):
        assert not is_image_name(name)
