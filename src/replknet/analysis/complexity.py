"""Parameters, multiply-adds and activations of any network, part by part."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

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
    layers, the convention of the published tables, which call them FLOPs; norms, activations, pooling and products
    inside attention are left out, padding is not. `activations` counts output elements of the same layers.
    """

    input_size: tuple[int, ...]
    params: int
    macs: int
    activations: int
    parts: tuple[Part, ...]


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
        layers, shapes = _run(empty_copy(model), torch.empty(1, *input_size, device="meta"))
    except (NotImplementedError, RuntimeError, TypeError):
        some = next((p for p in model.parameters()), torch.empty(0))
        layers, shapes = _run_in_place(model, torch.zeros(1, *input_size, device=some.device))
    parts = tuple(_part(model, name, layers, shapes) for name in _part_names(model))
    return Complexity(
        input_size=tuple(input_size),
        params=sum(p.numel() for p in model.parameters()),
        macs=sum(macs for macs, _ in layers.values()),
        activations=sum(outputs for _, outputs in layers.values()),
        parts=parts,
    )


def _run_in_place(model: nn.Module, x: Tensor) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, ...]]]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        return _run(model, x)
    except RuntimeError as error:
        raise ValueError(f"{type(model).__name__} does not take images of {list(x.shape[1:])}: {error}") from error
    finally:
        for module, training in modes:
            module.training = training


def _run(model: nn.Module, x: Tensor) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, ...]]]:
    """Multiply-adds and output elements of every counted layer, output shapes of every module, by name."""
    layers: dict[str, tuple[int, int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    handles = []
    for name, module in model.named_modules():

        def hook(module: nn.Module, inputs: tuple, output: object, name: str = name) -> None:
            if not isinstance(output, Tensor):
                return
            shapes[name] = tuple(output.shape[1:])
            if isinstance(module, (_ConvNd, nn.Linear)):
                macs, outputs = layers.get(name, (0, 0))
                layers[name] = (macs + _macs(module, inputs[0], output), outputs + output.numel())

        handles.append(module.register_forward_hook(hook))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    try:
        model.eval()(x.to(dtype))
    finally:
        for handle in handles:
            handle.remove()
    return layers, shapes


def _macs(module: nn.Module, x: Tensor, y: Tensor) -> int:
    if isinstance(module, nn.Linear):
        return y.numel() * module.in_features
    assert isinstance(module, _ConvNd)
    taps = prod(module.kernel_size)
    if isinstance(module, _ConvTransposeNd):
        return x.numel() * module.out_channels // module.groups * taps
    return y.numel() * module.in_channels // module.groups * taps


def _part_names(model: nn.Module) -> Iterator[str]:
    """Direct children, and the children of plain containers (`stages.0`) instead of these."""
    for name, child in model.named_children():
        if type(child) in (nn.Sequential, nn.ModuleList):
            yield from (f"{name}.{inner}" for inner, _ in child.named_children())
        else:
            yield name


def _part(model: nn.Module, name: str, layers: dict[str, tuple[int, int]], shapes: dict[str, tuple[int, ...]]) -> Part:
    inside = [cost for layer, cost in layers.items() if layer == name or layer.startswith(f"{name}.")]
    return Part(
        name=name,
        params=sum(p.numel() for p in model.get_submodule(name).parameters()),
        macs=sum(macs for macs, _ in inside),
        activations=sum(outputs for _, outputs in inside),
        output_shape=shapes.get(name),
    )
