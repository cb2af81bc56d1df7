"""`replknet complexity`: published costs, other libraries' networks, and exit codes."""

import json

import pytest

from replknet.cli import main


def run(*args):
    return main(["complexity", *map(str, args)])


# FLOPs of the release's README at 224 and of torchvision's own documentation.
@pytest.mark.parametrize(
    ("network", "size", "gmacs"),
    [("replknet_31b,merged", 224, 15.35), ("torchvision:resnet50", 224, 4.09), ("torchvision:vgg11", 224, 7.61)],
)
def test_published_costs(network, size, gmacs, capsys):
    assert run(network, "--size", size, "--json", "true") == 0
    (cost,) = json.loads(capsys.readouterr().out).values()
    assert cost["macs"] / 1e9 == pytest.approx(gmacs, abs=0.006)
    assert cost["input_size"] == [3, 224, 224]


def test_parts_add_up_and_sides_are_kept_apart(capsys):
    assert run("replknet_nano", "--size", "64x128", "--json", "true") == 0
    (cost,) = json.loads(capsys.readouterr().out).values()
    assert cost["input_size"] == [3, 64, 128]
    assert sum(part["macs"] for part in cost["parts"]) == cost["macs"]
    assert run("replknet_nano", "--size", "64x128", "--parts", "true") == 0
    text = capsys.readouterr().out
    assert "64x128" in text
    assert "stages.3" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "name at least one network"),
        (("replknet_nan",), "unknown model"),
        (("replknet_nano", "--size", "0"), "--size 0"),
        (("mixer_s32_224", "--size", "96"), "96 × 96"),
        (("vit_tiny_patch16_224", "--size", "100"), "use 96 × 96 or 112 × 112"),
    ],
)
def test_wrong_requests(args, message, capsys):
    assert run(*args) == 2
    assert message in capsys.readouterr().err
