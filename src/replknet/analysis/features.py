"""Where a network's feature maps are: the last one, every stage's, or any layer's by name, as `[N, C, h, w]`.

Networks hand out features as NCHW maps, NHWC maps or token sequences with or without class tokens; some only hand out
logits, and then the last layer with spatial extent has to be found by watching a forward pass.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from replknet._errors import UsageError

Layout = Literal["auto", "NCHW", "NHWC", "NLC"]

FORWARD_FEATURES = "forward_features"
OUTPUT = "output"
MAX_PREFIX_TOKENS = 8

# Their output has spatial extent and is no feature map of the network: a pooled or flattened copy of one.
_NOT_FEATURES = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Identity, nn.Dropout)


def to_feature_map(
    output: Any,
    image_size: tuple[int, int],
    *,
    layout: Layout = "auto",
    prefix_tokens: int | None = None,
    channels_last: bool = False,
) -> Tensor:
    """Bring a layer's output to `[N, C, h, w]`.

    Args:
        output: NCHW or NHWC map, `[N, L, C]` tokens, or a container of them: of a tuple the first is taken (hidden
            state before attention weights), of a list or mapping the last (the deepest stage), of an object with
            `last_hidden_state` that.
        image_size: `(H, W)` of the network's input in pixels; tells maps and token grids apart from other shapes.
        layout: "auto", or the layout to assume.
        prefix_tokens: tokens in front of the grid (class token, registers); None: whatever fits, up to 8.
        channels_last: prefer NHWC where both NCHW and NHWC fit.

    Raises:
        ValueError: the output has no spatial extent, or no grid fits its number of tokens.
    """
    x = _unwrap(output)
    if x.ndim == 4 and layout in ("auto", "NCHW", "NHWC"):
        return x.permute(0, 3, 1, 2) if _is_nhwc(x, image_size, layout, channels_last) else x
    if x.ndim == 3 and layout in ("auto", "NLC"):
        prefix, (h, w) = _token_grid(x.shape[1], image_size, prefix_tokens)
        return x[:, prefix:].transpose(1, 2).unflatten(2, (h, w))
    wanted = "a map [N, C, h, w] or [N, h, w, C] or tokens [N, L, C]" if layout == "auto" else layout
    raise ValueError(f"the output has shape {tuple(x.shape)}, which is not {wanted}: it has no spatial features")


def resolve_layers(model: nn.Module, layers: str | Sequence[str] | None, sample: Tensor) -> list[str]:
    """Names of the layers to look at.

    Args:
        layers: None: the last feature map; "stages": the last layer of every resolution; one name or several:
            those modules (names as in `model.named_modules()`).
        sample: `[1, C, H, W]`, used to watch a forward pass where the network does not say what its features are.

    Raises:
        UsageError: no such layer (with near names), or the network has no spatial features.
    """
    if layers is None:
        return [_last_layer(model, sample)]
    if layers == "stages":
        return _stage_layers(model, sample)
    names = [layers] if isinstance(layers, str) else list(layers)
    if not names:
        raise UsageError("no layer was named; name one or several, 'stages', or none for the last feature map")
    known = dict(model.named_modules())
    for name in names:
        if name not in known and name not in (FORWARD_FEATURES, OUTPUT):
            raise UsageError(_unknown_layer(name, [key for key in known if key]))
    return names


@contextmanager
def record(model: nn.Module, layer: str, receive) -> Iterator[None]:
    """Call `receive(output)` at every call of a layer inside the block; "" and the two virtual names watch nothing."""
    if layer in (FORWARD_FEATURES, OUTPUT):
        yield
        return
    handle = model.get_submodule(layer).register_forward_hook(lambda _module, _args, output: receive(output))
    try:
        yield
    finally:
        handle.remove()


def layout_hints(model: nn.Module) -> dict[str, Any]:
    """What a timm model says about its own layout: keyword arguments of `to_feature_map`."""
    output_format = getattr(model, "output_fmt", None)
    prefix = getattr(model, "num_prefix_tokens", None)
    return {
        "channels_last": getattr(output_format, "value", output_format) == "NHWC",
        "prefix_tokens": prefix if isinstance(prefix, int) else None,
    }


def _unwrap(output: Any) -> Tensor:
    hidden = getattr(output, "last_hidden_state", None)
    if isinstance(hidden, Tensor):
        return hidden
    if isinstance(output, Mapping):
        output = [value for value in output.values() if isinstance(value, Tensor)]
    if isinstance(output, tuple) and output:
        return _unwrap(output[0])
    if isinstance(output, list) and output:
        return _unwrap(output[-1])
    if isinstance(output, Tensor):
        return output
    raise ValueError(f"the output is a {type(output).__name__}, not a tensor: it has no spatial features")


def _fits(h: int, w: int, image_size: tuple[int, int]) -> bool:
    """Whether h × w has the image's aspect, up to the rounding of one stride."""
    height, width = image_size
    return h <= height and w <= width and abs(h * width - w * height) <= max(height, width)


def _is_nhwc(x: Tensor, image_size: tuple[int, int], layout: Layout, prefer: bool) -> bool:
    if layout != "auto":
        return layout == "NHWC"
    nchw, nhwc = _fits(x.shape[2], x.shape[3], image_size), _fits(x.shape[1], x.shape[2], image_size)
    return nhwc and (prefer or not nchw)


def _token_grid(tokens: int, image_size: tuple[int, int], prefix_tokens: int | None) -> tuple[int, tuple[int, int]]:
    """Number of prefix tokens and (h, w) of the grid. Image sides are multiples of the patch, or are padded to one."""
    height, width = image_size
    grids = {(-(-height // p), -(-width // p)) for p in range(1, max(image_size) + 1)}
    grids |= {(height // p, width // p) for p in range(1, min(image_size) + 1)}
    fits = sorted((tokens - h * w, (h, w)) for h, w in grids if 0 <= tokens - h * w <= MAX_PREFIX_TOKENS)
    if prefix_tokens is not None:
        fits = [fit for fit in fits if fit[0] == prefix_tokens] or fits
    if not fits:
        raise ValueError(
            f"{tokens} tokens are no grid for an image of {height} × {width}, with up to {MAX_PREFIX_TOKENS} tokens "
            "in front of it"
        )
    return fits[0]


def _last_layer(model: nn.Module, sample: Tensor) -> str:
    if callable(getattr(model, "forward_features", None)):
        return FORWARD_FEATURES
    maps = _watch(model, sample)
    if not maps:
        raise UsageError(
            f"{type(model).__name__} has no layer with spatial features at {sample.shape[2]} × {sample.shape[3]} "
            "pixels; give a larger size, or name a layer"
        )
    return maps[-1][0]


def _stage_layers(model: nn.Module, sample: Tensor) -> list[str]:
    known = dict(model.named_modules())
    names = [name for name in _feature_info(model) if name in known]
    if names:
        return names
    by_size = {size: name for name, size in _watch(model, sample)}
    if not by_size:
        raise UsageError(f"{type(model).__name__} has no layer with spatial features; name layers instead of 'stages'")
    return list(by_size.values())


def _feature_info(model: nn.Module) -> list[str]:
    info = getattr(model, "feature_info", None)
    rows = getattr(info, "info", info) or []
    return [row["module"] for row in rows if isinstance(row, Mapping) and row.get("module")]


def _watch(model: nn.Module, sample: Tensor) -> list[tuple[str, tuple[int, int]]]:
    """Names and (h, w) of all modules that return a feature map, in the order in which they finish."""
    size, hints, seen, handles = (sample.shape[2], sample.shape[3]), layout_hints(model), [], []

    def watch(name: str):
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            try:
                features = to_feature_map(output, size, **hints)
            except ValueError:
                return
            h, w = features.shape[2:]
            # What does not require grad does not depend on the image: position tables and the like.
            if features.requires_grad and h * w > 1 and _fits(h, w, size):
                seen.append((name or OUTPUT, (h, w)))

        return hook

    for name, module in model.named_modules():
        if not isinstance(module, _NOT_FEATURES):
            handles.append(module.register_forward_hook(watch(name)))
    try:
        with torch.enable_grad():
            model(sample.detach().requires_grad_())
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _unknown_layer(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"the network's parts are {', '.join(_top_level(known))}"
    return f"the network has no layer {name!r}; {hint}"


def _top_level(known: list[str]) -> list[str]:
    return [name for name in known if "." not in name]
