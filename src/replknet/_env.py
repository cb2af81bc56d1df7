"""Every environment variable that replknet reads, parsed in one place and read at the moment of use.

| variable | meaning |
|---|---|
| `REPLKNET_CACHE` | folder of compiled kernels, tuning results; default `replknet` in `$XDG_CACHE_HOME` or `~/.cache` |
| `REPLKNET_AUTOTUNE` | `1`: measure the backends of the depthwise convolution at the first call of each shape |
| `REPLKNET_WEIGHTS` | folder searched for official weight files before anything is downloaded |

Set by launchers, not by people: torchrun's `TORCHELASTIC_RUN_ID`, `WORLD_SIZE`, `LOCAL_WORLD_SIZE`, `RANK`; srun's
`SLURM_PROCID`, `SLURM_NTASKS`, `SLURM_NNODES`, `SLURM_JOB_NAME`; submitit's `SUBMITIT_EXECUTOR`.
"""

import os
from pathlib import Path
from typing import Literal, NamedTuple


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


class Launch(NamedTuple):
    """Processes that a launcher has started: `devices` on each of `nodes` machines."""

    kind: Literal["torchrun", "slurm"]
    devices: int
    nodes: int


def distributed_launch() -> Launch | None:
    """The launcher around this process, or None for a process started by hand.

    A submitit job on one machine exports torchrun's variables. An interactive SLURM shell is no launcher.
    """
    env = os.environ
    if "WORLD_SIZE" in env and "LOCAL_WORLD_SIZE" in env and ("TORCHELASTIC_RUN_ID" in env or submitit_executor()):
        world, local = int(env["WORLD_SIZE"]), int(env["LOCAL_WORLD_SIZE"])
        return Launch("torchrun", local, world // local)
    interactive = env.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_PROCID" in env and "SLURM_NTASKS" in env and not interactive:
        nodes = int(env.get("SLURM_NNODES", "1"))
        return Launch("slurm", int(env["SLURM_NTASKS"]) // nodes, nodes)
    return None


def submitit_executor() -> str | None:
    """ "slurm" or "local" inside a submitit job, else None."""
    return os.environ.get("SUBMITIT_EXECUTOR")


def is_first_process() -> bool:
    """Whether this is rank 0, or the only process; known before torch.distributed is set up."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "0")))) == 0


def autotune() -> bool:
    """Whether the depthwise convolution measures its backends at the first call of each shape."""
    return os.environ.get("REPLKNET_AUTOTUNE", "").lower() in ("1", "true", "yes", "on")
