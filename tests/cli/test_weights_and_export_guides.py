"""Commands of docs/weights.md and docs/export.md are understood by the command line; their Python compiles."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

ROOT = Path(__file__).parents[2]
PAGES = ("weights.md", "export.md")


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = (ROOT / "docs" / page).read_text()
        found += [(page, line) for line in re.findall(r"^(replknet .*)$", text, re.MULTILINE)]
        found += [(page, line) for line in re.findall(r"`(replknet [a-z]+ [^`\n]+)`", text)]
    return found


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: value[:60])
def test_command_is_understood(page, line):
    words = shlex.split(line, comments=True)[1:]
    name = words.pop(0) if words[0] != "bench" else f"{words.pop(0)}.{words.pop(0)}"
    parser = ArgumentParser(exit_on_error=False)
    importlib.import_module(f"replknet.cli.{name}").add_arguments(parser)
    parser.parse_args(words)


@pytest.mark.parametrize("page", PAGES)
def test_python_compiles(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, page, "exec")
        for module, names in re.findall(r"^from (replknet[\w.]*) import (.+)$", block, re.MULTILINE):
            assert all(hasattr(importlib.import_module(module), name.strip()) for name in names.split(","))


def test_there_are_commands_to_check():
    assert len(commands()) >= 15
