"""Every piece of code in docs/models.md runs, in order."""

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.mark.filterwarnings("error")
def test_code_of_the_guide_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pieces = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(pieces) == 5
    names: dict = {}
    for piece in pieces:
        exec(compile(piece, str(GUIDE), "exec"), names)
    assert "weights.pth: 297 keys loaded" in capsys.readouterr().out
    assert names["fused"].form == "fused"
    assert [m.shape[-2:] for m in names["maps"]] == [(16, 24), (8, 12), (4, 6)]
