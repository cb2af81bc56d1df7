"""Checkpoint files read safely: no pickled code runs, and a damaged file is one clear sentence."""

import argparse
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from replknet._errors import RunError, UsageError

_HARMLESS = [
    # The release's training checkpoints hold the command line as a Namespace and scores as numpy scalars: plain data.
    argparse.Namespace,
    np.dtype,
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
]


class _LogBuffer:
    """Stands for the logged values that mmengine's Runner keeps beside the weights."""

    min = max = current = mean = None


def _log_method(owner: type, name: str) -> None:
    """Stands for `getattr`, with which those values name the methods above; nothing else may be looked up."""
    if owner is not _LogBuffer or name not in ("min", "max", "current", "mean"):
        raise pickle.UnpicklingError(f"the file asks for {name} of {owner}")


PLAIN_ARRAYS: list[Any] = [
    np.ndarray,
    (np.empty(0).__reduce__()[0], "numpy._core.multiarray._reconstruct"),
    (np.empty(0).__reduce__()[0], "numpy.core.multiarray._reconstruct"),
    *(type(np.dtype(kind)) for kind in ("uint32", "uint8")),
]
"""Arrays of numbers."""
_RUNNER_LOGS: list[Any] = [
    *PLAIN_ARRAYS,
    (_LogBuffer, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_log_method, "builtins.getattr"),
]


def read_checkpoint(path: str | Path, *, logs: Sequence[Any] = tuple(_RUNNER_LOGS)) -> Mapping[str, Any]:
    """The mapping in a torch or safetensors file, on the CPU.

    Args:
        path: the file.
        logs: what torch's safe reader may make of the logs in a checkpoint of mmengine's Runner; by default nothing.

    Raises:
        UsageError: no such file, or a folder.
        RunError: not a checkpoint, damaged, or one that would run code when unpickled.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give a checkpoint file inside it")
    if not path.exists():
        raise UsageError(f"there is no file {path}")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    if reason := _why_not_a_checkpoint(head):
        raise RunError(f"{path} is not a checkpoint: {reason}")
    contents = _read_safetensors(path) if _is_safetensors(head) else _read_torch(path, logs)
    if not isinstance(contents, Mapping):
        raise RunError(f"{path} holds a {type(contents).__name__}, not a state dict")
    return contents


def _why_not_a_checkpoint(head: bytes) -> str | None:
    if not head:
        return "it is empty"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "it is a web page, as download sites send instead of a file; download it again"
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the real file with `git lfs pull`"
    return None


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and not head.startswith(b"PK")


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{path} is damaged or not a safetensors file: {_short(error)}") from error


def _read_torch(path: Path, logs: Sequence[Any]) -> Any:
    try:
        with torch.serialization.safe_globals([*_HARMLESS, *logs]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what cannot be read is an error below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RunError(_unpickling_problem(path, error)) from error
    except Exception as error:
        raise RunError(f"{path} is damaged (truncated?) or not a torch checkpoint: {_short(error)}") from error


def _unpickling_problem(path: Path, error: Exception) -> str:
    try:
        blocked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # noqa: BLE001 - only a more helpful message depends on it
        blocked = []
    if blocked:
        return (
            f"{path} would run code when opened ({', '.join(blocked)}), so it was not opened; "
            "save its state dict alone, as tensors, where you trust it"
        )
    # torch's own text advises to run the file's code; the sentence after "WeightsUnpickler error:" is the cause.
    cause = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
    return f"{path} is damaged or not a torch checkpoint: {cause}"


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    if not isinstance(error, (RuntimeError, OSError, ValueError)) or not text:
        text = f"{type(error).__name__} {text}".rstrip()
    return text if len(text) <= 160 else text[:157] + "..."
