"""Parameters, multiply-adds and activations of any network, part by part."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from replknet.analysis.mmcv_flops import mmcv_flops, multiply_adds
from replknet.layers.empty_copy import empty_copy


@dataclass(frozen=True)
class Part:
    """One part of a network, a stage for example."""

    name: str
    params: int
    macs: int
    activations: int
    output_shape: tuple[int, ...] | None
    """Without the batch dimension; None where the part did not run or its output is not a tensor."""


@dataclass(frozen=True)
class Complexity:
    """Costs of one image.

    `params` counts parameters (not buffers), each once. `macs` counts multiply-adds of convolutions and linear
    layers, the convention of the published classification tables, which call them FLOPs; norms, activations, pooling
    and products inside attention are left out, padding is not. `activations` counts output elements of the same
    layers. `mmcv_flops` is what MMCV's counter gives, the convention of the published segmentation and detection
    tables: `macs`, and an operation for each bias, ReLU and pooled element (`replknet.analysis.mmcv_flops`).
    """

    input_size: tuple[int, ...]
    params: int
    macs: int
    mmcv_flops: int
    activations: int
    parts: tuple[Part, ...]


@dataclass
class _Trace:
    """What one run met, by the names of the modules."""

    layers: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Multiply-adds and output elements of every convolution and linear layer."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Output shapes of every module."""
    mmcv_flops: int = 0


@torch.no_grad()
def complexity(model: nn.Module, input_size: Sequence[int] = (3, 224, 224)) -> Complexity:
    """Count what `model` costs for one image.

    Runs a copy without data on the meta device, so that size and speed of the machine do not matter; a model that
    cannot run there runs once on zeros where it is. Re-parameterise first to count the form that is deployed, as the
    published tables do.

    Args:
        model: any module that takes `[N, C, H, W]`; is left as it was.
        input_size: channels, height, width.

    Raises:
        ValueError: `input_size` is not three positive numbers, or the model refuses such an image.
    """
    if len(input_size) != 3 or min(input_size) < 1:
        raise ValueError(f"input_size must be (channels, height, width), all positive; got {tuple(input_size)}")
    try:
        trace = _run(empty_copy(model), torch.empty(1, *input_size, device="meta"))
    except (NotImplementedError, RuntimeError, TypeError):
        some = next((p for p in model.parameters()), torch.empty(0))
        trace = _run_in_place(model, torch.zeros(1, *input_size, device=some.device))
    return Complexity(
        input_size=tuple(input_size),
        params=sum(p.numel() for p in model.parameters()),
        macs=sum(macs for macs, _ in trace.layers.values()),
        mmcv_flops=trace.mmcv_flops,
        activations=sum(outputs for _, outputs in trace.layers.values()),
        parts=tuple(_part(model, name, trace) for name in _part_names(model)),
    )


def _run_in_place(model: nn.Module, x: Tensor) -> _Trace:
    modes = [(module, module.training) for module in model.modules()]
    try:
        return _run(model, x)
    except RuntimeError as error:
        raise ValueError(f"{type(model).__name__} does not take images of {list(x.shape[1:])}: {error}") from error
    finally:
        for module, training in modes:
            module.training = training


def _run(model: nn.Module, x: Tensor) -> _Trace:
    trace = _Trace()
    handles = []
    for name, module in model.named_modules():

        def hook(module: nn.Module, inputs: tuple, named: dict, output: object, name: str = name) -> None:
            if not isinstance(output, Tensor):
                return
            trace.shapes[name] = tuple(output.shape[1:])
            x = next((value for value in (*inputs, *named.values()) if isinstance(value, Tensor)), None)
            if x is None:
                return
            trace.mmcv_flops += mmcv_flops(module, x, output)
            if isinstance(module, (_ConvNd, nn.Linear)):
                macs, outputs = trace.layers.get(name, (0, 0))
                trace.layers[name] = macs + multiply_adds(module, x, output), outputs + output.numel()

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    try:
        model.eval()(x.to(dtype))
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _part_names(model: nn.Module) -> Iterator[str]:
    """Direct children, and instead of plain containers (`stages.0`) and of a wrapper's only child, their children."""
    children = dict(model.named_children())
    if len(children) == 1:
        ((name, only),) = children.items()
        inside = list(_part_names(only)) if not list(only.parameters(recurse=False)) else []
        yield from (f"{name}.{inner}" for inner in inside) if inside else (name,)
        return
    for name, child in children.items():
        if type(child) in (nn.Sequential, nn.ModuleList):
            yield from (f"{name}.{inner}" for inner, _ in child.named_children())
        else:
            yield name


def _part(model: nn.Module, name: str, trace: _Trace) -> Part:
    inside = [cost for layer, cost in trace.layers.items() if layer == name or layer.startswith(f"{name}.")]
    return Part(
        name=name,
        params=sum(p.numel() for p in model.get_submodule(name).parameters()),
        macs=sum(macs for macs, _ in inside),
        activations=sum(outputs for _, outputs in inside),
        output_shape=trace.shapes.get(name),
    )
