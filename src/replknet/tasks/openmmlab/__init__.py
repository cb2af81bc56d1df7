"""What segmentation and detection share on the maintained OpenMMLab forks (the `onedl-*` distributions).

Importing this module loads none of them: `require` does, after it has made sure that they can work.
"""

import importlib
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import metadata
from typing import Literal

from packaging.version import Version

from replknet._errors import UsageError

Task = Literal["segmentation", "detection"]

_SHARED = {"onedl-mmengine": "0.10.12", "onedl-mmcv": "2.3.6"}
REQUIRED: dict[Task, dict[str, str]] = {
    "segmentation": {**_SHARED, "onedl-mmsegmentation": "1.4.2", "ftfy": "0", "regex": "0"},
    "detection": {**_SHARED, "onedl-mmdetection": "3.5.1"},
}
"""Distributions of each extra, with the oldest version that works."""
ORIGINALS = ("mmengine", "mmengine-lite", "mmcv", "mmcv-full", "mmcv-lite", "mmsegmentation", "mmdet")
"""Distributions that bring modules of the same names and overwrite the forks' files."""
_REMARKS = (
    "Default ``avg_non_ignore`` is False",
    "The draw is False",
    "`reduce_zero_label` will be deprecated",
    "When align_corners=True, the output would more aligned",
    "The shape of value will convert from",
    "For binary segmentation, we suggest using",
)
"""Beginnings of the forks' warnings about settings that are meant so."""
_MODULES: dict[Task, str] = {"segmentation": "mmseg", "detection": "mmdet"}


def require(task: Task) -> None:
    """Make the forks of `task` usable: importable, quiet, and with `_base_ = 'mmseg::...'` in configs.

    Raises:
        UsageError: a distribution is missing or too old, or one of the originals is installed beside them; the message
            holds the pip command that helps.
    """
    if problem := why_not(task):
        raise UsageError(problem)
    # The original's distribution is called mmsegmentation; the fork is found by its module.
    mapping = importlib.import_module("mmengine.config.utils").MODULE2PACKAGE
    mapping.update(mmseg="mmseg", mmdet="mmdet")
    importlib.import_module("replknet.tasks.openmmlab.operators").place_operators()
    with _quietly():
        for part in ("models", "datasets", "evaluation", "engine", "visualization"):
            importlib.import_module(f"{_MODULES[task]}.{part}")
    importlib.import_module("replknet.tasks.openmmlab.checkpoint_files")
    for remark in _REMARKS:
        warnings.filterwarnings("ignore", message=re.escape(remark))


@contextmanager
def _quietly() -> Iterator[None]:
    """Inside, the forks' remarks on optional parts are not shown: on import they print them and log them."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def why_not(task: Task) -> str | None:
    """Why the forks of `task` cannot be used here, and what to do; None where they can."""
    if beside := [name for name in ORIGINALS if _version(name)]:
        names = " ".join(beside)
        return (
            f"{names} cannot stand beside the maintained forks (same module names): pip uninstall -y {names} "
            f"{' '.join(_forks())}, then pip install 'replknet[{task}]'"
        )
    missing = [name for name in REQUIRED[task] if not _version(name)]
    if missing:
        return f"{task} needs {', '.join(missing)}: pip install 'replknet[{task}]'"
    old = [
        f"{name} {_version(name)} (needs {oldest})"
        for name, oldest in REQUIRED[task].items()
        if Version(str(_version(name))) < Version(oldest)
    ]
    return f"too old for {task}: {', '.join(old)}; pip install -U 'replknet[{task}]'" if old else None


def _forks() -> list[str]:
    every = {name for required in REQUIRED.values() for name in required if name.startswith("onedl-")}
    return sorted(name for name in every if _version(name))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
