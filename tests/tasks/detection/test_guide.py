"""What docs/detection.md shows is understood; the commands that need no weights and no hours run on real data."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from replknet.cli import main
from replknet.cli.detect import COMMANDS
from replknet.models.weights import WEIGHTS
from replknet.tasks.openmmlab.configs import parse_options, read_config

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "detection.md").read_text(encoding="utf-8")
LINES = re.findall(r"^(?:torchrun .* -m )?replknet detect (.*)$", TEXT, re.MULTILINE)


def parsed(line: str):
    words = shlex.split(line)
    parser = ArgumentParser(exit_on_error=False)
    importlib.import_module(f"replknet.cli.detect.{words[0]}").add_arguments(parser)
    return parser.parse_args(words[1:])


@pytest.mark.parametrize("line", LINES)
def test_command_is_understood(line):
    arguments = parsed(line)
    if config := getattr(arguments, "config", None):
        read_config(ROOT / config)
    weights = getattr(arguments, "weights", None)
    assert weights is None or weights.startswith("runs/") or weights in WEIGHTS


def test_every_command_is_shown():
    assert {line.split()[0] for line in LINES} == set(COMMANDS)


def test_every_recipe_is_in_the_table():
    table = "".join(line for line in TEXT.splitlines() if line.startswith("| `"))
    named = set(re.findall(r"`(replknet_\w+)`", table))
    assert named == {path.stem for path in (ROOT / "recipes" / "detection").glob("*.py")}


def test_changes_of_a_config():
    (words,) = re.findall(r"--cfg_options '\[(.*?)\]'", TEXT)
    read_config(ROOT / "recipes/detection/replknet_tiny_fcos.py", parse_options([words]))


def test_check_runs(coco_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "train.json").write_text((coco_folder / "all.json").read_text())
    (tmp_path / "pictures").symlink_to(coco_folder)
    monkeypatch.chdir(tmp_path)
    (line,) = [line for line in LINES if line.startswith("check")]
    assert main(["detect", *shlex.split(line)]) == 0
    assert "2 pictures, 27 objects, 12 classes" in capsys.readouterr().out


def test_complexity_prints_the_table_of_the_guide(capsys):
    assert main(["detect", "complexity"]) == 0
    line = r"^replknet\S+ +([\d.]+) +([\d.]+) +([\d.]+) +(\d+) +(\d+)$"
    printed = re.findall(line, capsys.readouterr().out, re.MULTILINE)
    shown = re.findall(r"([\d.]+)M / (\d+)M \| (\d+)G \| (\d+)G / (\d+)G", TEXT)
    rows = {
        (params, published, str(round(float(macs))), str(round(float(flops))), flops_published)
        for params, macs, flops, published, flops_published in printed
    }
    assert len(printed) == 5
    assert rows == set(shown)


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
def test_python_compiles(block):
    compile(block, "docs/detection.md", "exec")
    for module, names in re.findall(r"^from (replknet[\w.]*) import (.+)$", block, re.MULTILINE):
        assert all(hasattr(importlib.import_module(module), name.strip()) for name in names.split(","))
