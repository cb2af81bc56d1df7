"""Imports go one way: ops, layers, models, then tasks, analysis and benchmark, then plotting, then cli."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import replknet

SOURCE = Path(replknet.__file__).parent

# What each room may import, beside itself and the private modules at the root.
MAY_IMPORT = {
    "ops": set(),
    "layers": {"ops"},
    "compat": {"ops", "layers"},
    "models": {"ops", "layers", "analysis"},
    "data": set(),
    "tasks": {"ops", "layers", "models", "data"},
    "analysis": {"ops", "layers", "models", "data"},
    "benchmark": {"ops", "layers", "models", "analysis", "export"},
    "export": {"ops", "layers", "models"},
    "plotting": {"analysis", "benchmark", "data"},
    "cli": {"ops", "layers", "models", "data", "tasks", "analysis", "benchmark", "export", "plotting"},
}
# Measures of a model that are part of describing it; `analysis` itself must not lean back on `models` there.
NARROW = {("models", "analysis"): {"replknet.analysis.complexity"}}


def modules() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.stem in MAY_IMPORT)


def imported(path: Path) -> set[str]:
    """Full names of the modules of this package that a file imports, at any depth of its functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            names |= {f"{base}.{alias.name}" if _is_module(f"{base}.{alias.name}") else base for alias in node.names}
    return {name for name in names if name.split(".")[0] == "replknet"}


def _is_module(name: str) -> bool:
    if not name.startswith("replknet."):
        return False
    path = SOURCE.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py").exists() or path.is_dir()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for name in imported(path):
        parts = name.split(".")
        if len(parts) == 1 or parts[1] == room or parts[1].startswith("_"):
            continue
        assert parts[1] in MAY_IMPORT[room], f"{room} must not import {name}"
        narrow = NARROW.get((room, parts[1]))
        assert narrow is None or name in narrow, f"{room} may import only {', '.join(narrow or ())}, not {name}"


def test_every_room_has_a_rule():
    rooms = {path.name for path in SOURCE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert rooms <= set(MAY_IMPORT)


def in_a_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_importing_is_quiet_and_light():
    # torch imports cuda.bindings itself where it is installed; what counts is what this package adds.
    code = """
import sys, torch, timm
before = set(sys.modules)
import replknet
heavy = {"lightning", "matplotlib", "jsonargparse", "cuda", "sklearn", "onnx", "submitit"}
print(sorted(heavy & {name.split(".")[0] for name in set(sys.modules) - before}), torch.cuda.is_initialized())
print("replknet_31b" in timm.list_models("replknet*"))
"""
    assert in_a_new_process(code).split("\n") == ["[] False", "True", ""]


def test_the_operator_runs_without_the_compiler_front_end():
    code = (
        "import sys; sys.modules['cuda'] = None\n"
        "import torch, replknet\n"
        "x, w = torch.zeros(1, 2, 4, 4), torch.zeros(2, 1, 3, 3)\n"
        "replknet.ops.depthwise_conv2d(x, w)\n"
        "print(replknet.ops.explain(x, w).forward.backend)"
    )
    assert in_a_new_process(code).strip() == "torch"
