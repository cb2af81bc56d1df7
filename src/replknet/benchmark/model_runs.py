"""One configuration of a network made callable: prepared, compiled where asked for, with what it computed at hand."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from replknet.layers import DepthwiseConv2d, reparameterize
from replknet.models.accelerate import accelerate
from replknet.models.factory import create_model
from replknet.models.optimize import FORMATS, Format, optimize

Mode = Literal["inference", "training", "features", "erf"]
Execution = Literal["eager", "compile", "autotune", "graph", "compile_graph", "autotune_graph", "onnxruntime"]
Convolution = Literal["torch", "replknet", "optimize"]
MODES: tuple[Mode, ...] = get_args(Mode)
EXECUTIONS: tuple[Execution, ...] = get_args(Execution)
CONVOLUTIONS: tuple[Convolution, ...] = get_args(Convolution)
__all__ = ["CONVOLUTIONS", "EXECUTIONS", "FORMATS", "MODES", "Call", "Format", "How", "build", "call_of"]


@dataclass(frozen=True)
class How:
    """How a network is run.

    Modes: "inference" is a forward pass, "training" a step of AdamW, "features" all feature maps, "erf" the gradient
    of the centre of the last feature map with respect to the images.
    Convolutions: "torch" is torch's own everywhere, "replknet" this package's depthwise convolution, "optimize" the
    whole of `replknet.optimize`.
    Executions: "compile" and "autotune" (matrix products timed by the compiler) go through torch.compile; with "graph"
    a whole call is one CUDA graph.
    """

    mode: Mode
    merged: bool
    convolution: Convolution
    execution: Execution
    dtype: torch.dtype
    format: Format
    checkpointing: bool = False

    @property
    def graph(self) -> bool:
        """Whether the whole call is captured into a CUDA graph."""
        return self.execution.endswith("graph")

    @property
    def compiled(self) -> bool:
        """Whether torch.compile is used."""
        return self.execution.startswith(("compile", "autotune"))


@dataclass(frozen=True)
class Call:
    """`run()` computes; after it `results()` tells, by name, what has to be right."""

    run: Callable[[], Tensor]
    results: Callable[[], dict[str, Tensor]]


class _Trunk(nn.Module):
    """A classifier without its head."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network.forward_features(x)  # type: ignore[operator]


def build(name: str, mode: str) -> nn.Module:
    """A network with random weights (of the current seed) for one mode, on the CPU."""
    if mode == "features":
        return create_model(name, features_only=True)
    network = create_model(name)
    return _Trunk(network) if mode == "erf" else network


def call_of(model: nn.Module, how: How, images: Tensor) -> Call:
    """A copy of the model made callable in one way.

    Raises:
        RuntimeError, NotImplementedError: this way does not exist for this network or machine.
    """
    network = copy.deepcopy(model).to(images.device).train(how.mode == "training")
    if how.checkpointing:
        network.set_grad_checkpointing(True)  # type: ignore[operator]
    if how.execution == "onnxruntime":
        return _onnxruntime(network, images, how)
    network = _prepared(network, how)
    images = images.contiguous(
        memory_format=torch.channels_last if how.format == "channels_last" else torch.contiguous_format
    )
    if how.mode == "training":
        return _training_step(network, images, how.dtype)
    return (_erf if how.mode == "erf" else _forward)(network, images.to(how.dtype))


def _prepared(network: nn.Module, how: How) -> nn.Module:
    dtype = None if how.mode == "training" else how.dtype
    if how.convolution == "optimize":
        mode = "training" if how.mode == "training" else "inference"
        autotune = how.execution.startswith("autotune")
        options: dict[str, Any] = {"memory_format": how.format, "compile": how.compiled, "autotune": autotune}
        return optimize(network, mode, dtype=dtype, **options)
    if how.merged:
        network = reparameterize(network)
    if how.convolution == "torch":
        _use_torchs_convolutions(network)
    else:
        accelerate(network)
    layout = torch.channels_last if how.format == "channels_last" else torch.contiguous_format
    network = network.to(dtype).to(memory_format=layout)  # type: ignore[call-overload]
    if how.compiled:
        network.compile(dynamic=False, options={"max_autotune": how.execution.startswith("autotune")})
    return network


def _use_torchs_convolutions(network: nn.Module) -> None:
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is DepthwiseConv2d:
                activation, child.activation = child.activation, None
                child.__class__ = nn.Conv2d  # type: ignore[assignment]
                if activation == "relu":
                    setattr(module, name, nn.Sequential(child, nn.ReLU()))


def _forward(network: nn.Module, images: Tensor) -> Call:
    results: dict[str, Tensor] = {}

    @torch.no_grad()
    def run() -> Tensor:
        output = network(images)
        maps = [output] if isinstance(output, Tensor) else list(output)
        results.update({f"output {index}": value for index, value in enumerate(maps)})
        return maps[-1]

    return Call(run, results.copy)


def _erf(network: nn.Module, images: Tensor) -> Call:
    results: dict[str, Tensor] = {}
    images = images.detach().clone().requires_grad_()

    def run() -> Tensor:
        features = network(images)
        centre = features[..., features.shape[-2] // 2, features.shape[-1] // 2].sum()
        (results["gradients"],) = torch.autograd.grad(centre, images)
        return results["gradients"]

    return Call(run, results.copy)


def _training_step(network: nn.Module, images: Tensor, dtype: torch.dtype) -> Call:
    cuda = images.device.type == "cuda"
    labels = torch.arange(len(images), device=images.device) % int(network.num_classes)  # type: ignore[arg-type]
    # A learning rate of zero leaves the weights, so that every repetition computes, and can be checked for, the same.
    zero: dict[str, Any] = {"lr": 0.0, "weight_decay": 0.0, "capturable": cuda, "fused": cuda}
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, **zero)
    logits = images.new_empty(0)

    def step() -> Tensor:
        nonlocal logits
        optimizer.zero_grad()
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            output = network(images)
        nn.functional.cross_entropy(output.float(), labels).backward()
        optimizer.step()
        logits = output.detach()
        return logits

    def results() -> dict[str, Tensor]:
        gradients = [parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]
        return {"output 0": logits, "gradients": torch.cat(gradients)}

    return Call(step, results)


def _onnxruntime(network: nn.Module, images: Tensor, how: How) -> Call:
    """ONNX Runtime on the exported network, on the CPU with as many threads as torch has."""
    if how.mode != "inference" or how.dtype != torch.float32:
        raise NotImplementedError(f"ONNX Runtime is measured for inference in float32, not {how.mode} in {how.dtype}")
    import onnxruntime

    from replknet.export import export_model

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        # The exporter tries batches of one and of several.
        export_model(network, path, images.cpu().repeat(2, 1, 1, 1), merge=how.merged)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.cpu().numpy()}
    logits = images.new_empty(0)

    def run() -> Tensor:
        nonlocal logits
        logits = torch.from_numpy(session.run(None, feed)[0])
        return logits

    return Call(run, lambda: {"output 0": logits})
