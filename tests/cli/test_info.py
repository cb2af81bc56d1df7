import json

import pytest
import timm

from replknet.cli import main


def test_stages_add_up(capsys):
    assert main(["info", "replknet_31b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["params"] == 79_527_272 == sum(part["params"] for part in found["parts"])
    assert found["macs"] == sum(part["macs"] for part in found["parts"])
    assert [entry["tag"] for entry in found["weights"]][:2] == ["in1k_224", "in1k_384"]


def test_training_form(capsys):
    assert main(["info", "replknet_31b", "--form", "train", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["params"] == 79_864_168


def test_any_timm_model_and_size(capsys):
    assert main(["info", "resnet18", "--size", "[64,96]", "--num_classes", "10"]) == 0
    text = capsys.readouterr().out
    assert "input 3x64x96" in text
    params = sum(parameter.numel() for parameter in timm.create_model("resnet18", num_classes=10).parameters())
    assert f"{params / 1e6:.3f}" in text.splitlines()[-1]
    assert "official weights" not in text


@pytest.mark.parametrize("args", [["nope"], ["resnet18", "--size", "0"], ["resnet18", "--size", "[1,2,3]"]])
def test_impossible_requests_are_exit_code_2(args, capsys):
    assert main(["info", *args]) == 2
    assert capsys.readouterr().err.startswith("replknet: ")
