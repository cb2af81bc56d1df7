"""Theoretical receptive field: the input pixels that a unit of a feature map can depend on at all.

The model is run on meta tensors, which compute nothing, and every operation tells how far its output reaches: a
convolution adds `(kernel - 1) · dilation · jump` and multiplies the jump by its stride, parallel branches take the
wider one. What mixes all positions (attention, global pooling, statistics over the map, anything unknown) makes the
field unbounded. The image's border is ignored, so the size may exceed the image.

Source: Araujo et al. 2019, "Computing Receptive Fields of Convolutional Neural Networks", distill.pub.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from replknet._errors import UsageError
from replknet.analysis.features import FORWARD_FEATURES, OUTPUT, layout_hints, record, to_feature_map
from replknet.layers.empty_copy import empty_copy


@dataclass(frozen=True)
class ReceptiveField:
    """Size and stride of a layer's receptive field in pixels, `(height, width)`; infinite where nothing bounds it."""

    size: tuple[float, float]
    stride: tuple[float, float]

    @property
    def bounded(self) -> bool:
        """False for attention, global pooling and the like."""
        return all(math.isfinite(side) for side in self.size)


def theoretical_receptive_field(
    model: nn.Module, layer: str = FORWARD_FEATURES, *, image_size: tuple[int, int] = (224, 224), in_chans: int = 3
) -> ReceptiveField:
    """Receptive field of one unit of a layer.

    Args:
        model: any module; a copy without data is used, the model itself is not run.
        layer: name of a module, "forward_features" or "output".
        image_size: `(H, W)`; matters only to networks that insist on a size.
        in_chans: channels of the image.

    Raises:
        UsageError: the layer is not called or has no spatial features, or the model cannot run on meta tensors.
    """
    shadow = empty_copy(model).eval()
    tracer = _Tracer()
    image = torch.empty(1, in_chans, *image_size, device="meta")
    tracer.start(image)
    kept: list[Any] = []
    try:
        with torch.no_grad(), tracer, record(shadow, layer, kept.append):
            output = shadow.forward_features(image) if layer == FORWARD_FEATURES else shadow(image)  # pyright: ignore[reportCallIssue]
            seen = output if layer in (FORWARD_FEATURES, OUTPUT) else kept[-1] if kept else None
            features = to_feature_map(seen, image_size, **layout_hints(model)) if seen is not None else None
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise UsageError(f"the receptive field of {layer!r} cannot be traced: {error}") from error
    if features is None:
        raise UsageError(f"the forward pass never calls {layer!r}")
    reach = tracer.reach_of(features)
    if reach is None:
        raise UsageError(f"layer {layer!r} does not depend on the image")
    return ReceptiveField(reach.size, reach.jump)


@dataclass(frozen=True)
class _Reach:
    """How far a tensor's entries see: size and jump by (height, width); `dims` are the tensor's spatial axes."""

    size: tuple[float, float]
    jump: tuple[float, float]
    dims: frozenset[int]

    def everything(self) -> "_Reach":
        return replace(self, size=(math.inf, math.inf))


class _Tracer(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._reach: dict[int, _Reach] = {}
        # Identities stay unique only while the tensors live.
        self._alive: list[Tensor] = []

    def start(self, image: Tensor) -> None:
        self._set(image, _Reach((1, 1), (1, 1), frozenset((2, 3))))

    def reach_of(self, tensor: Tensor) -> _Reach | None:
        return self._reach.get(id(tensor))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [value for value in _tensors((args, tuple(kwargs.values()))) if id(value) in self._reach]
        if inputs:
            reaches = [self._reach[id(value)] for value in inputs]
            for tensor in _tensors(out):
                self._set(tensor, _after(func, args, inputs, reaches, tensor))
        return out

    def _set(self, tensor: Tensor, reach: _Reach) -> None:
        self._reach[id(tensor)] = reach
        self._alive.append(tensor)


_MIX_EVERYTHING = ("attention", "group_norm", "fft", "cumsum", "sort", "topk", "flip", "grid_sampler")


def _after(func: Any, args: Sequence[Any], inputs: list[Tensor], reaches: list[_Reach], out: Tensor) -> _Reach:
    name = func.__name__.split(".")[0].removesuffix("_")
    space = func.namespace
    first = reaches[0]
    if space == "replknet" and "depthwise_conv2d" in name:
        return _slide(first, tuple(inputs[0].shape[2:]), tuple(args[1].shape[2:]), (1, 1), (1, 1))
    if name == "cat":
        return replace(_widest(reaches), dims=first.dims)
    rule = _RULES.get(name)
    if rule is not None:
        return rule(first, args, inputs[0], out, len(reaches))
    if any(
        word in name for word in ("attention", "group_norm", "fft", "cumsum", "sort", "topk", "flip", "grid_sampler")
    ):
        return _global(first, out)
    return _pointwise(inputs, reaches, out)


def _pointwise(inputs: list[Tensor], reaches: list[_Reach], out: Tensor) -> _Reach:
    """Elementwise with broadcasting, or an unknown operation whose shape gives it away as something else."""
    dims: set[int] = set()
    for tensor, reach in zip(inputs, reaches, strict=True):
        offset = out.ndim - tensor.ndim
        shifted = {dim + offset for dim in reach.dims}
        if offset < 0 or any(tensor.shape[dim] not in (1, out.shape[dim + offset]) for dim in range(tensor.ndim)):
            return _global(reaches[0], out)
        dims |= shifted
    return replace(_widest(reaches), dims=frozenset(dims))


def _widest(reaches: list[_Reach]) -> _Reach:
    size = [max(reach.size[axis] for reach in reaches) for axis in (0, 1)]
    jump = [max(reach.jump[axis] for reach in reaches) for axis in (0, 1)]
    return replace(reaches[0], size=(size[0], size[1]), jump=(jump[0], jump[1]))


def _global(reach: _Reach, out: Tensor) -> _Reach:
    return replace(reach.everything(), dims=frozenset(range(out.ndim)))


def _slide(
    reach: _Reach,
    side: tuple[int, ...],
    kernel: Sequence[int],
    stride: Sequence[float],
    dilation: Sequence[int],
) -> _Reach:
    """A window that slides over the map; one that covers it whole in both directions is still only a window."""
    if not reach.dims <= {2, 3} or len(side) != 2:
        return reach if all(k == 1 for k in kernel) else reach.everything()
    grown = [reach.size[i] + (kernel[i] - 1) * dilation[i] * reach.jump[i] for i in (0, 1)]
    jumps = [reach.jump[i] * stride[i] for i in (0, 1)]
    return replace(reach, size=(grown[0], grown[1]), jump=(jumps[0], jumps[1]))


def _pair(value: Any) -> tuple[int, int]:
    values = [value, value] if isinstance(value, int) else list(value)
    return (int(values[0]), int(values[-1]))


def _convolution(reach: _Reach, args: Sequence[Any], x: Tensor, out: Tensor, tagged: int) -> _Reach:
    weight, stride, dilation, transposed = args[1], args[3], args[5], args[6]
    if tagged > 1 or weight.ndim != 4:
        return _global(reach, out)
    kernel = tuple(weight.shape[2:])
    if transposed:
        steps = _pair(stride)
        kernel = tuple(-(-k // s) for k, s in zip(kernel, steps, strict=True))
        return _slide(reach, tuple(x.shape[2:]), kernel, tuple(1 / s for s in steps), (1, 1))
    return _slide(reach, tuple(x.shape[2:]), kernel, _pair(stride), _pair(dilation))


def _pool(reach: _Reach, args: Sequence[Any], x: Tensor, out: Tensor, tagged: int) -> _Reach:
    del out, tagged
    kernel = _pair(args[1])
    stride = _pair(args[2]) if len(args) > 2 and args[2] else kernel
    return _slide(reach, tuple(x.shape[2:]), kernel, stride, (1, 1))


def _max_pool(reach: _Reach, args: Sequence[Any], x: Tensor, out: Tensor, tagged: int) -> _Reach:
    dilation = _pair(args[4]) if len(args) > 4 else (1, 1)
    wide = [(k - 1) * d + 1 for k, d in zip(_pair(args[1]), dilation, strict=True)]
    return _pool(reach, (args[0], wide, *(args[2:3] or [_pair(args[1])])), x, out, tagged)


def _adaptive_pool(reach: _Reach, args: Sequence[Any], x: Tensor, out: Tensor, tagged: int) -> _Reach:
    del args, tagged
    if tuple(out.shape[2:]) == tuple(x.shape[2:]):
        return reach
    if out.shape[2] * out.shape[3] == 1:
        return _global(reach, out)
    ratios = [x.shape[dim] / out.shape[dim] for dim in (2, 3)]
    return _slide(reach, tuple(x.shape[2:]), [math.ceil(ratio) for ratio in ratios], ratios, (1, 1))


def _upsample(reach: _Reach, args: Sequence[Any], x: Tensor, out: Tensor, tagged: int) -> _Reach:
    del args, tagged
    return _slide(reach, tuple(x.shape[2:]), (2, 2), [x.shape[dim] / out.shape[dim] for dim in (2, 3)], (1, 1))


def _reduce(reach: _Reach, args: Sequence[Any], x: Tensor, out: Tensor, tagged: int) -> _Reach:
    del tagged
    over = args[1] if len(args) > 1 and args[1] is not None else range(x.ndim)
    gone = {int(dim) % x.ndim for dim in ([over] if isinstance(over, int) else over)}
    if gone & reach.dims:
        return _global(reach, out)
    if out.ndim == x.ndim:
        return reach
    return replace(reach, dims=frozenset(dim - sum(one < dim for one in gone) for dim in reach.dims))


def _norm(reach: _Reach, args: Sequence[Any], x: Tensor, out: Tensor, tagged: int) -> _Reach:
    return _reduce(reach, (args[0], *args[2:3]), x, out, tagged)


def _along(reach: _Reach, args: Sequence[Any], x: Tensor, out: Tensor, tagged: int) -> _Reach:
    del tagged
    return _global(reach, out) if int(args[1]) % x.ndim in reach.dims else reach


def _layer_norm(reach: _Reach, args: Sequence[Any], x: Tensor, out: Tensor, tagged: int) -> _Reach:
    del tagged
    normalised = set(range(x.ndim - len(args[1]), x.ndim))
    return _global(reach, out) if normalised & reach.dims else reach


def _product(reach: _Reach, args: Sequence[Any], x: Tensor, out: Tensor, tagged: int) -> _Reach:
    """Matrix products with a weight contract one axis; of two activations, they mix positions."""
    if tagged > 1:
        return _global(reach, out)
    left = any(x is arg for arg in args[-2:-1])
    contracted = x.ndim - 1 if left else x.ndim - 2
    return _global(reach, out) if contracted in reach.dims else reach


def _permute(reach: _Reach, args: Sequence[Any], x: Tensor, out: Tensor, tagged: int) -> _Reach:
    del out, tagged
    order = [int(dim) % x.ndim for dim in args[1]]
    return replace(reach, dims=frozenset(order.index(dim) for dim in reach.dims))


def _transpose(reach: _Reach, args: Sequence[Any], x: Tensor, out: Tensor, tagged: int) -> _Reach:
    order = list(range(x.ndim))
    a, b = (int(args[1]), int(args[2])) if len(args) > 2 else (0, 1)
    order[a], order[b] = order[b], order[a]
    return _permute(reach, (args[0], order), x, out, tagged)


def _view(reach: _Reach, args: Sequence[Any], x: Tensor, out: Tensor, tagged: int) -> _Reach:
    """Line up old and new axes by their products; an axis made with a spatial one's help is spatial."""
    del args, tagged
    old, new, dims = list(x.shape), list(out.shape), set()
    i = j = 0
    while i < len(old) and j < len(new):
        start_i, start_j, a, b = i, j, old[i], new[j]
        while a != b:
            if a < b:
                i += 1
                a *= old[i]
            else:
                j += 1
                b *= new[j]
        if any(dim in reach.dims for dim in range(start_i, i + 1)):
            # An axis of one entry has no positions to mix; counting it would taint the batch axis.
            dims |= {dim for dim in range(start_j, j + 1) if new[dim] > 1}
        i, j = i + 1, j + 1
    return replace(reach, dims=frozenset(dims))


def _insert(reach: _Reach, args: Sequence[Any], x: Tensor, out: Tensor, tagged: int) -> _Reach:
    del x, tagged
    at = int(args[1]) % out.ndim
    return replace(reach, dims=frozenset(dim + (dim >= at) for dim in reach.dims))


def _remove(reach: _Reach, args: Sequence[Any], x: Tensor, out: Tensor, tagged: int) -> _Reach:
    del out, tagged
    at = int(args[1]) % x.ndim if len(args) > 1 else 0
    return replace(reach, dims=frozenset(dim - (dim > at) for dim in reach.dims if dim != at))


def _same(reach: _Reach, args: Sequence[Any], x: Tensor, out: Tensor, tagged: int) -> _Reach:
    del args, x, out, tagged
    return reach


_Rule = Callable[[_Reach, Sequence[Any], Tensor, Tensor, int], _Reach]
_RULES: dict[str, _Rule] = {
    "convolution": _convolution,
    "avg_pool2d": _pool,
    "max_pool2d_with_indices": _max_pool,
    "_adaptive_avg_pool2d": _adaptive_pool,
    "adaptive_max_pool2d": _adaptive_pool,
    "upsample_nearest2d": _upsample,
    "upsample_bilinear2d": _upsample,
    "upsample_bicubic2d": _upsample,
    "_upsample_bilinear2d_aa": _upsample,
    "_upsample_bicubic2d_aa": _upsample,
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std"), _reduce),
    **dict.fromkeys(("norm", "linalg_vector_norm"), _norm),
    **dict.fromkeys(("_softmax", "_log_softmax"), _along),
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _layer_norm,
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), _product),
    "permute": _permute,
    **dict.fromkeys(("transpose", "t"), _transpose),
    **dict.fromkeys(("view", "_unsafe_view", "reshape"), _view),
    "unsqueeze": _insert,
    **dict.fromkeys(("squeeze", "select", "unbind"), _remove),
    **dict.fromkeys(("slice", "split", "split_with_sizes", "chunk", "constant_pad_nd"), _same),
    **dict.fromkeys(("reflection_pad2d", "replication_pad2d"), _same),
}


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
