"""Checkpoint files of mmengine's Runner, read without running any code from them.

mmengine opens a file that torch's safe reader refuses once more with full pickle; here such a file is an error. All
that goes through `mmengine.runner.CheckpointLoader` (`load_from`, resume, `init_cfg` of other modules) is read so.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor

from replknet._errors import UsageError
from replknet.models._checkpoint_files import PLAIN_ARRAYS, read_checkpoint
from replknet.models.download import fetch_weights
from replknet.models.weights import WEIGHTS

_STATISTICS = ("min", "max", "current", "mean")


def _history_method(owner: type, name: str) -> Any:
    """Stands for `getattr` in a checkpoint's pickle, where nothing but these methods may be looked up."""
    if owner is not HistoryBuffer or name not in _STATISTICS:
        raise ValueError(f"a checkpoint asks for {name} of {owner}")
    return getattr(owner, name)


_LOGS: list[Any] = [*PLAIN_ARRAYS, HistoryBuffer, (_history_method, "builtins.getattr")]


def read_runner_checkpoint(path: str | Path) -> Mapping[str, Any]:
    """The mapping in a checkpoint of mmengine's or mmcv's Runner, or in any other checkpoint file, on the CPU.

    Args:
        path: a file, or the name of official weights (downloaded unless at hand).

    Raises:
        UsageError: neither.
        RunError: damaged, or a file that would run code.
    """
    return read_checkpoint(weights_file(path), logs=_LOGS)


def weights_file(checkpoint: str | Path) -> Path:
    """The file that official weights' name (downloaded unless at hand) or a path stands for.

    Raises:
        UsageError: it is neither.
        RunError: official weights that cannot be had; the message says from where and where to put them by hand.
    """
    if str(checkpoint) in WEIGHTS:
        return fetch_weights(str(checkpoint))
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        raise UsageError(
            f"{checkpoint} is neither a file nor the name of official weights (`replknet models` lists these)"
        )
    return path


def _load(filename: str, map_location: Any = None) -> Mapping[str, Any]:
    contents = dict(read_runner_checkpoint(filename))
    if isinstance(meta := contents.get("meta"), dict):
        # The config's text in files of mmcv's Runner, which mmengine would execute on resuming.
        meta.pop("config", None)
    return _moved(contents, map_location)


def _moved(value: Any, map_location: Any) -> Any:
    if map_location in (None, "cpu"):
        return value
    if isinstance(value, Tensor):
        return value.to(map_location)
    if isinstance(value, Mapping):
        return {key: _moved(inner, map_location) for key, inner in value.items()}
    return [_moved(inner, map_location) for inner in value] if isinstance(value, list) else value


# Public extension point of mmengine; the empty prefix is that of local files.
CheckpointLoader.register_scheme(prefixes="", loader=_load, force=True)
