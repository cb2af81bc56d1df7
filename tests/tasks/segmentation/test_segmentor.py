"""Segmenting: sizes, windows, augmentation, forms, precisions; files written. The network is small and untrained."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from replknet._errors import UsageError
from replknet.tasks.openmmlab import require

require("segmentation")
import replknet.tasks.segmentation  # noqa: E402, F401
from replknet import cli  # noqa: E402
from replknet.tasks.openmmlab.configs import read_config  # noqa: E402
from replknet.tasks.segmentation.prediction import predict_to_folder, save_labels  # noqa: E402
from replknet.tasks.segmentation.segmentor import (  # noqa: E402
    LogitsModel,
    build_segmentor,
    open_segmentor,
    prepare_for_inference,
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory, small_config):
    """A checkpoint whose norms look trained; one network for all tests of this file."""
    config = read_config(small_config())
    torch.manual_seed(0)
    model = build_segmentor(config)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(0.2 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    nn.init.normal_(model.decode_head.conv_seg.weight, std=0.5, generator=generator)
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    config.model.decode_head.num_classes = config.model.auxiliary_head.num_classes = 10
    torch.save({"meta": {"cfg": config.pretty_text}, "state_dict": model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def picture(crops):
    with Image.open(sorted((crops / "images").iterdir())[0]) as image:
        return image.convert("RGB")


def logits_of(opened, image):
    pixels = torch.from_numpy(np.asarray(image, np.float32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        return LogitsModel(opened.model).eval()(pixels)


def test_labels_are_the_largest_logits_of_normalised_pixels(weights, picture):
    opened = open_segmentor(weights, merged=False)
    want = logits_of(opened, picture)[0].argmax(0).numpy()
    got = opened.segment(picture)
    assert got.shape == (96, 96)
    assert np.array_equal(got, want)
    assert len(np.unique(got)) > 1


@pytest.mark.parametrize("size", [(1, 1), (37, 5), (64, 131)], ids=str)
def test_any_size_comes_back_at_its_own(size, weights, picture):
    assert open_segmentor(weights).segment(picture.resize(size)).shape == size[::-1]


def test_merged_gives_the_same_labels(weights, picture):
    plain, merged = (open_segmentor(weights, merged=merged) for merged in (False, True))
    a, b = (logits_of(opened, picture) for opened in (plain, merged))
    assert torch.allclose(a, b, atol=1e-4 * float(a.abs().max()))
    assert np.mean(plain.segment(picture) == merged.segment(picture)) > 0.999
    assert sum(p.numel() for p in merged.model.parameters()) < sum(p.numel() for p in plain.model.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_agrees_nearly_everywhere(precision, weights, picture):
    full, half = (open_segmentor(weights, precision=p).segment(picture) for p in ("fp32", precision))
    assert np.mean(full == half) > 0.97


def test_one_window_over_the_whole_picture_is_the_whole(weights, picture):
    whole, slide = (open_segmentor(weights, mode=mode).segment(picture) for mode in ("whole", "slide"))
    assert np.array_equal(whole, slide)


def test_windows_are_averaged(weights, picture):
    wide = picture.resize((150, 96))
    opened = open_segmentor(weights, mode="slide")
    total, count = torch.zeros(1, 10, 96, 150), torch.zeros(150)
    for x in (0, 54):  # 96 wide, 64 apart, the last one moved back to the edge
        total[..., x : x + 96] += logits_of(opened, wide.crop((x, 0, x + 96, 96)))
        count[x : x + 96] += 1
    want = (total / count)[0].argmax(0).numpy()
    assert np.mean(opened.segment(wide) == want) > 0.999


@pytest.mark.slow
def test_augmentation_averages_probabilities_of_sizes_and_mirrors(weights, picture):
    opened = open_segmentor(weights, tta=True)
    got = opened.segment(picture)
    plain = open_segmentor(weights)
    import mmcv

    total = torch.zeros(10, 96, 96)
    pixels = np.asarray(picture)[:, :, ::-1]
    for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75):
        resized = mmcv.imrescale(pixels, (int(2048 * ratio), int(512 * ratio)))
        for flip in (False, True):
            image = Image.fromarray(np.ascontiguousarray((resized[:, ::-1] if flip else resized)[:, :, ::-1]))
            logits = logits_of(plain, image)
            logits = logits.flip(3) if flip else logits
            scaled = nn.functional.interpolate(logits, size=(96, 96), mode="bilinear", align_corners=False)
            total += scaled[0].softmax(0)
    assert np.mean(got == total.argmax(0).numpy()) > 0.999


def test_files_of_a_folder_with_a_broken_picture(weights, crops, tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    source = sorted((crops / "images").iterdir())[0]
    for name in ("a.png", "deep/a.png"):
        (tmp_path / "in" / name).write_bytes(source.read_bytes())
    (tmp_path / "in" / "b.jpg").write_bytes(b"broken")
    opened = open_segmentor(weights)
    paths = sorted((tmp_path / "in").rglob("*.*g"))
    results = list(predict_to_folder(opened, paths, tmp_path / "out"))
    assert [r.error is None for r in results] == [True, False, True]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "a-2.labels.png", "a-2.overlay.jpg", "a.labels.png", "a.overlay.jpg", "predictions.json",
    ]  # fmt: skip
    with Image.open(tmp_path / "out" / "a.labels.png") as image:
        labels = np.asarray(image)
        shown = np.asarray(image.convert("RGB"))
    assert np.array_equal(labels, opened.segment(source))
    assert np.array_equal(shown, np.asarray(opened.palette, np.uint8)[labels])
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [c["name"] for c in written["classes"]] == (crops / "classes.txt").read_text().split("\n")[:-1]
    first, broken, _ = written["predictions"]
    assert "error" in broken
    assert sum(c["share"] for c in first["classes"]) == pytest.approx(1, abs=1e-4)
    assert first["classes"][0]["share"] == pytest.approx(np.mean(labels == first["classes"][0]["label"]), abs=1e-6)


def test_more_classes_than_a_palette_holds(tmp_path):
    labels = np.array([[0, 299]])
    save_labels(labels, [[0, 0, 0]] * 300, tmp_path / "l.png")
    with Image.open(tmp_path / "l.png") as image:
        assert np.asarray(image).tolist() == labels.tolist()


def test_the_heads_classes_are_numbered_where_nobody_names_them(small_config, tmp_path):
    config = read_config(small_config(), {"model.decode_head.num_classes": 4, "model.auxiliary_head.num_classes": 4})
    assert open_segmentor(config=config).classes == ["0", "1", "2", "3"]


def test_inference_drops_the_auxiliary_head(small_config):
    model = build_segmentor(read_config(small_config()))
    assert not hasattr(prepare_for_inference(model), "auxiliary_head")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.jpg", "--weights", "W"], "no such file or folder"),
        (["P"], "give --weights"),
        (["P", "--weights", "absent.pth"], "neither a file nor the name of official weights"),
        (["P", "--weights", "replknet_31b.in1k_224"], "weights for classification"),
        (["P", "--weights", "P"], "not a torch checkpoint|not a checkpoint|damaged"),
        (["P", "--weights", "W", "--opacity", "2"], "--opacity 2"),
        (["P", "--weights", "W", "--cfg_options", "a=1"], "give it by --config"),
        (["P", "--weights", "W", "--device", "cuda:9"], "cuda:9"),
    ],
)
def test_wrong_requests_are_one_line(words, message, weights, crops, tmp_path, capsys):
    real = {"W": str(weights), "P": str(sorted((crops / "images").iterdir())[0])}
    words = [real.get(word, word) for word in words]
    assert cli.main(["segment", "predict", *words, "--output", str(tmp_path / "out")]) in (1, 2)
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    import re

    assert re.search(message, error)
    assert not list(tmp_path.glob("out/*.png"))


def test_a_config_of_other_classes_than_the_weights(weights, small_config):
    from replknet._errors import RunError

    config = read_config(small_config(), {"model.decode_head.num_classes": 4})
    with pytest.raises(RunError, match=r"decode_head.conv_seg.weight is \[10, 32, 1, 1\], the model needs \[4"):
        open_segmentor(weights, config=config)
    config = read_config(small_config())
    config.model.data_preprocessor.pop("size")
    with pytest.raises(UsageError, match="crop size"):
        open_segmentor(weights, config=config, mode="slide")
