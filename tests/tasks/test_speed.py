"""What "auto" comes to on each kind of device, and when CUDA graphs are taken."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import nn

from replknet.tasks import classification
from replknet.tasks.classification import Classification, ModelDescription
from replknet.tasks.speed import WORTH_COMPILING_STEPS, resolve_speed, takes_cuda_graphs
from replknet.tasks.train import TrainConfig

LONG = WORTH_COMPILING_STEPS


def one(device: str) -> SingleDeviceStrategy:
    return SingleDeviceStrategy(device=torch.device(device))


def several(kind: type, device: str):
    strategy = kind()
    strategy.parallel_devices = [torch.device(device, index) for index in range(2)]
    strategy.cluster_environment = LightningEnvironment()
    return strategy


@pytest.fixture
def equipped(monkeypatch):
    """A machine with Triton and a C compiler, as far as anyone asks."""
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")


@pytest.mark.parametrize(
    ("strategy", "steps", "speed", "reason"),
    [
        (one("cuda:0"), LONG, "compiled", "earn back"),
        (one("cuda:0"), LONG - 1, "plain", "do not earn back"),
        (several(DDPStrategy, "cuda"), LONG, "plain", "CUDA graphs"),
        (several(ModelParallelStrategy, "cuda"), LONG, "plain", "fsdp"),
        (several(ModelParallelStrategy, "cpu"), LONG, "plain", "fsdp"),
        (one("cpu"), 1, "eager", "CPU"),
        (one("cpu"), LONG, "eager", "CPU"),
        (several(DDPStrategy, "cpu"), LONG, "eager", "CPU"),
        (one("mps"), LONG, "plain", "measured"),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "root_device") else str(value),
)
def test_auto(strategy, steps, speed, reason, equipped):
    assert resolve_speed("auto", strategy, steps).name == speed
    assert reason in resolve_speed("auto", strategy, steps).reason


def test_auto_where_gradients_add_up(equipped):
    assert resolve_speed("auto", one("cuda:0"), LONG, accumulation=2).name == "plain"


@pytest.mark.parametrize("lacking", ["Triton", "compiler"])
def test_auto_where_nothing_can_be_compiled(lacking, equipped, monkeypatch):
    if lacking == "Triton":
        monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    else:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    speed = resolve_speed("auto", one("cuda:0"), LONG)
    assert speed.name == "plain"
    assert lacking in speed.reason


def test_auto_on_other_vendors_gpus(equipped, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert resolve_speed("auto", one("cuda:0"), LONG).name == "plain"


@pytest.mark.parametrize("speed", ["plain", "eager", "compiled"])
def test_a_named_speed_stays(speed):
    assert resolve_speed(speed, several(DDPStrategy, "cuda"), 1).name == speed


def test_auto_is_the_default():
    assert TrainConfig().speed == "auto"


GRAPHS = [
    ("compiled", one("cuda:0"), True),
    ("compiled", one("cpu"), False),
    ("compiled", several(DDPStrategy, "cuda"), False),
    ("eager", one("cuda:0"), False),
]


@pytest.mark.parametrize(("speed", "strategy", "taken"), GRAPHS, ids=["one GPU", "CPU", "two GPUs", "eager"])
def test_cuda_graphs_are_for_compiled_training_in_one_process_on_cuda(speed, strategy, taken, monkeypatch):
    assert takes_cuda_graphs(speed, strategy) is taken
    calls = []
    monkeypatch.setattr(classification, "optimize", lambda *args, **options: calls.append((args[1:], options)))
    # There may be no such device here.
    monkeypatch.setattr(nn.Module, "to", lambda self, *args, **options: self)
    module = Classification(nn.Linear(2, 2), ModelDescription("net", 2), None, speed=speed)  # type: ignore[arg-type]
    module.trainer = SimpleNamespace(strategy=strategy, accumulate_grad_batches=1)  # type: ignore[assignment]
    module.setup("fit")
    assert calls == [(("training",), {"compile": speed == "compiled", "cuda_graph": taken})]
