import json

import pytest

from replknet.cli import main


def test_detection_rows(capsys):
    assert main(["models", "--task", "detection", "31l"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "name"
    assert lines[2].split("  ")[0] == "replknet_31l.in22k_cascade_mask_rcnn_coco"
    assert "AP box 53.9, AP mask 46.5" in lines[2]
    assert len(lines) == 3


def test_json_holds_files_and_urls(capsys):
    assert main(["models", "replknet_31b.in1k_384", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["gmacs"] == pytest.approx(45.12, abs=0.005)
    assert row["files"][0] == "replknet-31B_3rdparty_in1k-384px_20221118-03a170ce.pth"
    assert row["urls"][0].endswith(row["files"][0])


def test_nothing_found_is_exit_code_2(capsys):
    assert main(["models", "resnet50"]) == 2
    assert "no RepLKNet matches 'resnet50'" in capsys.readouterr().err
