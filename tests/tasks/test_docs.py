"""Commands of docs/training.md, docs/migrating.md and the recipes' headers are understood by the command line."""

import re
import shlex
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from replknet.cli import eval as eval_command
from replknet.cli import submit as submit_command
from replknet.cli import train as train_command

ROOT = Path(__file__).parents[2]
MODULES = {"train": train_command, "submit": submit_command, "eval": eval_command}


COMMAND = r"((?:torchrun [^`\n]*-m )?replknet (?:train|submit|eval) [^`\n]*)"


def commands() -> list[tuple[str, str]]:
    found = []
    for page in ("training.md", "migrating.md"):
        text = (ROOT / "docs" / page).read_text()
        found += [(page, line) for line in re.findall(f"`{COMMAND}`", text)]
        found += [(page, line) for line in re.findall(f"^{COMMAND}$", text, re.MULTILINE)]
    for path in sorted((ROOT / "recipes/classification").glob("*.yaml")):
        found += [(path.stem, line) for line in re.findall(r"^# (?:One machine|SLURM): +(.*)$", path.read_text(), re.M)]
    # Not those that stand for many, nor the one that names a file of a finished run.
    return [(page, line) for page, line in found if not re.search(r"\.\.\.|--help|config\.yaml", line)]


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: value[:60])
def test_command_is_understood(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    line = re.sub(r"\bR/", "recipes/classification/", line)
    line = re.sub(r"\bRECIPE\b", "recipes/classification/replknet_31b_1k_224.yaml", line)
    command, *arguments = shlex.split(line.split("replknet ", 1)[1])
    parser = ArgumentParser(exit_on_error=False)
    MODULES[command].add_arguments(parser)
    parser.parse_args(arguments)


def test_there_are_commands_to_check():
    pages = [page for page, _ in commands()]
    assert pages.count("training.md") >= 8
    assert pages.count("migrating.md") >= 15
    assert len(pages) >= 40
