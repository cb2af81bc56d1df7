"""The Python of docs/analysis.md runs, and its commands have the options that it names."""

import re
from pathlib import Path

from jsonargparse import ArgumentParser

from replknet.cli import complexity, erf, shape_bias

PAGE = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text("utf-8")


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    exec(blocks[0], {})
    assert (tmp_path / "erf.pdf").read_bytes().startswith(b"%PDF")
    # The other one needs a toolbox that is not installed here.
    compile(blocks[1], "docs/analysis.md", "exec")


def test_commands_and_options_exist():
    known = {}
    for name, module in {"erf": erf, "shape-bias": shape_bias, "complexity": complexity}.items():
        parser = ArgumentParser()
        module.add_arguments(parser)
        known[name] = parser.format_help()
    commands = re.findall(r"replknet (erf|shape-bias|complexity)\b([^`\n]*)", PAGE)
    assert len(commands) >= 9
    for name, rest in commands:
        for option in re.findall(r"--\w+", rest):
            assert option in known[name], (name, option)
    for option in re.findall(r"--\w+", PAGE):
        assert any(option in text for text in known.values()), option
