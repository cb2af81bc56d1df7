"""The folder of a run: what it was asked, from which code, with which versions."""

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

from replknet._errors import UsageError
from replknet._files import write_text

_PACKAGES = ("replknet", "torch", "torchvision", "timm", "lightning", "numpy", "pillow", "submitit")


def refuse_existing(folder: Path) -> None:
    """Raise UsageError if the folder holds a run that could be lost."""
    if (folder / "checkpoints" / "last.ckpt").exists():
        raise UsageError(
            f"{folder} holds a run already: go on with --resume auto, name another --output, or lose it with "
            "--overwrite true"
        )


@rank_zero_only
def prepare(folder: Path, *, keep: bool = True) -> None:
    """Make the folder and its `checkpoints`; remove what a killed save left behind, and, unless `keep`, an old run.

    Raises:
        UsageError: the folder cannot be made or written to.
    """
    checkpoints = folder / "checkpoints"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in (*folder.glob(".*.tmp"), *checkpoints.glob(".*.tmp")):
            leftover.unlink(missing_ok=True)
        if not keep:
            for name in ("checkpoints/last.ckpt", "checkpoints/best.ckpt", "metrics.jsonl", "metrics.csv"):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        write_text(folder / ".writable", "")
        (folder / ".writable").unlink()
    except OSError as error:
        raise UsageError(f"--output {folder}: cannot write there: {error.strerror or error}") from error


def describe(folder: Path, config: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Write config.yaml (every option with its value) and environment.json (versions, git, device, derived batch)."""
    write_text(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
    environment = {
        "command": sys.argv,
        "versions": versions(),
        "git": git_state(Path.cwd()),
        "device": device_name(),
        **plan,
    }
    write_text(folder / "environment.json", json.dumps(environment, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Python's, the platform's and the relevant packages' versions."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    # The package's metadata leave out the build.
    return found | {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}


def device_name() -> str:
    """Name of the first GPU, or the CPU's."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and changed files of the working tree around `folder`; None outside one, or without git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no") or ""
    return {"commit": commit.strip(), "changed": [line[3:] for line in changed.splitlines()]}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
