"""Commands in the README and in guides are understood by the command line; their Python compiles."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

ROOT = Path(__file__).parents[2]
# The other guides have tests of their own, which also run what they show.
PAGES = (
    "README.md",
    "docs/data.md",
    "docs/evaluation.md",
    "docs/export.md",
    "docs/segmentation.md",
    "docs/speed.md",
    "docs/weights.md",
)


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        found += [(page, line) for line in re.findall(r"^(replknet .*)$", text, re.MULTILINE)]
        found += [(page, line) for line in re.findall(r"`(replknet [a-z-]+(?: [^`\n]+)?)`", text)]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: value[:60])
def test_command_is_understood(page, line):
    words = shlex.split(line, comments=True)[1:]
    name = words.pop(0).replace("-", "_")
    if hasattr(importlib.import_module(f"replknet.cli.{name}"), "COMMANDS"):
        name += f".{words.pop(0)}"
    parser = ArgumentParser(exit_on_error=False)
    importlib.import_module(f"replknet.cli.{name}").add_arguments(parser)
    if words:  # a bare name in running text names the command alone
        parser.parse_args(words)


@pytest.mark.parametrize("page", PAGES)
def test_every_page_has_commands(page):
    assert sum(of == page for of, _ in commands()) >= 4


@pytest.mark.parametrize("page", PAGES)
def test_python_compiles(page):
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL):
        compile(block, page, "exec")
        for module, names in re.findall(r"^from (replknet[\w.]*) import (.+)$", block, re.MULTILINE):
            assert all(hasattr(importlib.import_module(module), name.strip()) for name in names.split(","))


def test_python_of_the_readme_runs():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
