"""Commands in the guides on data and evaluation: every option that they use exists and takes what it is given."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

DOCS = Path(__file__).parents[2] / "docs"


def commands() -> list[str]:
    found = []
    for name in ("data.md", "evaluation.md"):
        blocks = re.findall(r"^```\n(.*?)^```", (DOCS / name).read_text(), re.DOTALL | re.MULTILINE)
        found += [line for block in blocks for line in block.splitlines() if line.startswith("replknet ")]
    return found


def test_there_are_commands():
    assert len(commands()) >= 12


@pytest.mark.parametrize("line", commands())
def test_command_parses(line):
    _, command, *args = shlex.split(line)
    module = importlib.import_module(f"replknet.cli.{command}")
    parser = ArgumentParser(exit_on_error=False)
    module.add_arguments(parser)
    parser.parse_args(args)
