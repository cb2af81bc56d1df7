"""How a training runs its network: as it was built, in the form that is fast on its device, or compiled."""

import shutil
from typing import Literal, NamedTuple, get_args

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy, Strategy

ResolvedSpeed = Literal["plain", "eager", "compiled"]
Speed = Literal["auto", "plain", "eager", "compiled"]
SPEEDS: tuple[Speed, ...] = get_args(Speed)

# RepLKNet-31B on an H200, 64 images a step: compiling takes about 150 s and saves about 50 ms of every step
# (benchmarks/results/2026-11-29_h200_train_command.csv), which are equal at 3000 steps. What lies above is for networks
# and machines that save less.
WORTH_COMPILING_STEPS = 5000


class ChosenSpeed(NamedTuple):
    """A speed, and in a few words why it was chosen."""

    name: ResolvedSpeed
    reason: str


def resolve_speed(speed: Speed, strategy: Strategy, steps: int, accumulation: int = 1) -> ChosenSpeed:
    """What "auto" stands for on the devices of `strategy`, and why; other speeds stay.

    Args:
        speed: what was asked for.
        strategy: Lightning's, with its devices known.
        steps: optimizer steps of the whole training, those before it was resumed included.
        accumulation: micro-batches of a step.
    """
    if speed != "auto":
        return ChosenSpeed(speed, "asked for by name")
    device = strategy.root_device.type
    if isinstance(strategy, ModelParallelStrategy):
        return ChosenSpeed("plain", "fsdp shards the model as it was built")
    if device == "cpu":
        return ChosenSpeed("eager", "fast forms of the layers, on a CPU")
    if device != "cuda" or torch.version.hip is not None:
        return ChosenSpeed("plain", "neither of the others has been measured on this accelerator")
    if not isinstance(strategy, SingleDeviceStrategy):
        return ChosenSpeed("plain", "several processes compile without CUDA graphs, and one was no faster for that")
    if accumulation > 1:
        return ChosenSpeed("plain", "CUDA graphs beside gradients that add up have not been measured")
    if steps < WORTH_COMPILING_STEPS:
        return ChosenSpeed("plain", f"{steps} steps do not earn back the compilation, {WORTH_COMPILING_STEPS} would")
    if lacking := _why_not_compilable():
        return ChosenSpeed("plain", lacking)
    return ChosenSpeed("compiled", f"{steps} steps earn back the compilation")


def takes_cuda_graphs(speed: ResolvedSpeed, strategy: Strategy) -> bool:
    """Whether the compiled network is captured in CUDA graphs.

    In one process only. Among several GPUs batch norms exchange statistics (`SyncBatchNorm`), at each of which
    torch.compile ends a graph, and DistributedDataParallel cuts it at its buckets.
    """
    single = isinstance(strategy, SingleDeviceStrategy)
    return speed == "compiled" and single and strategy.root_device.type == "cuda"


def _why_not_compilable() -> str | None:
    """What torch.compile lacks for a GPU on this machine."""
    # Private to torch, and what torch.compile itself asks.
    from torch.utils._triton import has_triton

    if not has_triton():
        return "torch.compile needs Triton, which is not installed or does not support this GPU"
    if not any(map(shutil.which, ("gcc", "clang"))):
        return "Triton needs a C compiler, and there is no gcc or clang"
    return None
