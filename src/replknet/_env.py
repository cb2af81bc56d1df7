"""Every environment variable that replknet reads, parsed in one place and read at the moment of use.

| variable | meaning |
|---|---|
| `REPLKNET_CACHE` | folder of compiled kernels and tuning results; default `$XDG_CACHE_HOME/replknet` or `~/.cache/replknet` |
| `REPLKNET_WEIGHTS` | folder searched for official weight files before anything is downloaded |
"""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder of compiled kernels and tuning results; not created here."""
    if override := os.environ.get("REPLKNET_CACHE"):
        return Path(override).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "replknet"


def weights_dir() -> Path | None:
    """Folder of weight files put there by hand, or None."""
    value = os.environ.get("REPLKNET_WEIGHTS")
    return Path(value).expanduser() if value else None
