"""`replknet demo`: the report, short, and at its real length."""

import base64
import json
import re
import time

import pytest
from PIL import Image

from replknet.cli import main


def pictures(report: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', report)]


def check(folder, printed: str) -> dict:
    assert printed.splitlines()[-1] == str(folder / "report.html")
    report = (folder / "report.html").read_text()
    assert len(pictures(report)) == 4
    for data in pictures(report):
        assert data.startswith(b"\x89PNG")
    # Self-contained: nothing is fetched, nothing runs.
    assert not re.search(r"(?:src|href)=\"(?!data:)", report)
    assert "<script" not in report
    assert "http" not in report
    for name in ("checkpoints/last.ckpt", "config.yaml", "metrics.csv", "demo.json"):
        assert (folder / name).is_file(), name
    return json.loads((folder / "demo.json").read_text())


@pytest.mark.slow
def test_demo_reaches_its_aim(tmp_path, capsys):
    begin = time.monotonic()
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 0
    record = check(tmp_path / "demo", capsys.readouterr().out)
    before, after = record["evaluation"]["before"], record["evaluation"]["after"]
    assert before["n"] == 360
    assert min(before["top1"], after["top1"]) >= 97
    assert record["evaluation"]["changed"] == 0
    assert record["evaluation"]["relative_difference"] < 1e-4
    assert set(record["erf_area_ratios"]) == {"untrained", "trained"}
    assert time.monotonic() - begin < 540
    # Its checkpoint is an ordinary one.
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    checkpoint = tmp_path / "demo" / "checkpoints" / "last.ckpt"
    assert main(["predict", str(tmp_path / "black.png"), "--weights", str(checkpoint), "--device", "cpu"]) == 0


def test_wrong_requests_are_one_line(tmp_path, capsys):
    assert main(["demo", "--epochs", "0", "--output", str(tmp_path)]) == 2
    assert "epochs 0" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["demo", "--output", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err
