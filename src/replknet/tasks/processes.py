"""Processes and devices of a command that torchrun may have started several times."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from replknet._errors import UsageError


@contextmanager
def process_device(requested: str = "auto") -> Iterator[torch.device]:
    """The device of this process; under torchrun, the process group too, for as long as the block lasts.

    Args:
        requested: "auto" (a GPU if there is one), or a torch device such as "cpu" or "cuda:1".

    Raises:
        UsageError: a device that this machine or this torch does not have.
    """
    launched = dist.is_available() and dist.is_torchelastic_launched()
    # Not in torch.distributed's list of public names, and documented all the same.
    device = _resolve(requested, dist.get_node_local_rank() if launched else 0)  # pyright: ignore[reportPrivateImportUsage]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not launched:
        yield device
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        # What refers to the group goes first: a thread of it that outlives the interpreter may abort the process.
        gc.collect()
        dist.destroy_process_group()


def _resolve(requested: str, local_rank: int) -> torch.device:
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(requested)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {requested}: not usable here ({str(error).splitlines()[0]})") from error
    return device
