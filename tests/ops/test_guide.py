"""The guide to the operator: its code runs and its commands parse."""

import re
import shlex
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from replknet.cli.bench import op

GUIDE = (Path(__file__).parents[2] / "docs" / "ops.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    return [text for kind, text in found if kind == language]


def test_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("REPLKNET_CACHE", str(tmp_path))
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block, "docs/ops.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "forward: " in printed
    assert "replaced 12 of 40" in printed
    assert list((tmp_path / "tuning").glob("*.json"))


COMMANDS = [line for block in blocks("") for line in block.splitlines() if line.startswith("replknet ")]


def test_there_are_commands():
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line):
    program, bench, name, *args = shlex.split(line)
    assert (program, bench, name) == ("replknet", "bench", "op")
    parser = ArgumentParser(exit_on_error=False)
    op.add_arguments(parser)
    parser.parse_args(args)
