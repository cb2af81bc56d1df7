"""Effective receptive field: how much each input pixel moves the centre of a feature map.

The release's protocol, on any network: the score of an image is the sum over channels of relu(feature at the centre);
its gradient with respect to the image goes through relu, is summed over the image's channels, and is averaged over the
images. Images whose gradient is not finite are left out and counted.

Source: Ding et al. 2022, arXiv:2203.06717, sec. 4.1 and figure 1, and the official release's `erf/` scripts.
Luo et al. 2016, arXiv:1701.04128, for the signed and squared variants.
"""

import copy
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from replknet._errors import RunError, UsageError
from replknet.analysis._accumulate import Accumulator, SingleImages, State, weights_digest
from replknet.analysis.features import (
    FORWARD_FEATURES,
    OUTPUT,
    Layout,
    layout_hints,
    record,
    resolve_layers,
    to_feature_map,
)

Variant = Literal["release", "abs", "squared", "signed"]
Score = Literal["relu", "sum"]

logger = logging.getLogger(__name__)

# Pixels from which activations of a deep network fill gigabytes.
_LARGE_IMAGE = 512 * 512

_PER_PIXEL: dict[str, Callable[[Tensor], Tensor]] = {
    "release": torch.relu,
    "abs": torch.abs,
    "squared": torch.square,
    "signed": lambda gradient: gradient,
}


@dataclass(frozen=True)
class ErfResult:
    """One layer's effective receptive field.

    Attributes:
        matrix: `[H, W]` float64, mean contribution of every input pixel; nothing negative unless variant is "signed".
        layer: name of the layer, "forward_features" or "output".
        variant, score: how gradients became contributions, and what was differentiated.
        n_images, n_not_finite: images averaged, and images left out because their gradient was not finite.
        feature_size: `(h, w)` of the layer's map; its centre is `(h // 2, w // 2)`.
    """

    matrix: np.ndarray = field(repr=False)
    layer: str
    variant: str
    score: str
    n_images: int
    n_not_finite: int
    feature_size: tuple[int, int]


def effective_receptive_field(
    model: nn.Module, images: Tensor | Iterable[Any], *, layer: str | None = None, **options: Any
) -> ErfResult:
    """Effective receptive field of one layer; None is the last feature map. Options: `effective_receptive_fields`."""
    if layer == "stages":
        raise UsageError("'stages' names several layers; call effective_receptive_fields")
    results = effective_receptive_fields(model, images, layers=layer, **options)
    return next(iter(results.values()))


def effective_receptive_fields(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    *,
    layers: str | Sequence[str] | None = None,
    variant: Variant = "release",
    score: Score = "relu",
    n: int | None = 50,
    batch_size: int = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    layout: Layout = "auto",
    checkpointing: bool | None = None,
    state_file: Path | str | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, ErfResult]:
    """Effective receptive fields of several layers from one forward pass an image.

    The model runs in eval mode and without parameter gradients; both are put back as they were. Batching changes
    nothing but the speed: contributions are formed and judged image by image.

    Args:
        model: any module; see `features.to_feature_map` for the outputs that are understood.
        images: normalised images `[C, H, W]` of one size: a tensor `[N, C, H, W]`, or an iterable of images, of
            batches, or of `(image, label)` pairs as data sets and loaders yield them.
        layers: None: the last feature map; "stages": every resolution's last layer; or module names.
        variant: "release" sums relu(gradient) over colours, "abs" |gradient|, "squared" gradient², "signed" gradient.
        score: "relu" differentiates sum(relu(centre)) as the release does, "sum" sum(centre).
        n: images to average, None for all there are. Fewer available: a warning, and `n_images` says how many.
        batch_size: images a pass; memory grows with it.
        device: where to run; None: where the model is.
        dtype: float32, float64, or bfloat16/float16 (autocast).
        layout: how to read the layers' outputs.
        checkpointing: trade a second forward for memory by the model's `set_grad_checkpointing`. None: on the CPU for
            large images, where it costs little, if the model offers it.
        state_file: sums are kept here (atomically, every ten seconds) and taken up again by a later call with the same
            model, images and settings, which then gives the same matrix. Removed when done.
        progress: called with images done and `n`.

    Raises:
        UsageError: unknown layer, variant or score; a network without spatial features; images of differing sizes; a
            state file of another run.
        RunError: no image gave a finite gradient.
    """
    _check_options(variant, score, n, batch_size)
    device = torch.device(device) if device is not None else _device_of(model)
    stream = SingleImages(images)
    first = stream.peek()
    if checkpointing is None:
        large = first.shape[-2] * first.shape[-1] >= _LARGE_IMAGE
        checkpointing = large and device.type == "cpu" and hasattr(model, "set_grad_checkpointing")
    with _frozen(model, device, dtype, checkpointing) as frozen:
        probe = first[None].to(device, _input_dtype(dtype))
        with _autocast(device, dtype):
            names = resolve_layers(frozen, layers, probe)
        total = Accumulator(names, (first.shape[-2], first.shape[-1]))
        tap = _CentreGradients(frozen, total.feature_size, variant, score, layout, dtype, names)
        state = State(state_file, total, lambda: _fingerprint(model, images, tap, first))
        stream.skip(state.load())
        with state.saved_on_failure():
            _run(tap, total, stream, n, batch_size, device, state, progress)
    state.remove()
    return {
        name: ErfResult(
            matrix=total.sums[name] / total.count,
            layer=name,
            variant=variant,
            score=score,
            n_images=total.count,
            n_not_finite=total.not_finite,
            feature_size=total.feature_size[name],
        )
        for name in names
    }


def _run(
    tap: "_CentreGradients",
    total: Accumulator,
    stream: SingleImages,
    n: int | None,
    batch_size: int,
    device: torch.device,
    state: State,
    progress: Callable[[int, int | None], None] | None,
) -> None:
    while n is None or total.count < n:
        wanted = batch_size if n is None else min(batch_size, n - total.count)
        batch = stream.take(wanted)
        if not batch:
            break
        total.add(tap(torch.stack(batch).to(device, _input_dtype(tap.dtype))))
        state.save_if_due()
        if progress is not None:
            progress(total.count, n)
    if total.count == 0:
        raise RunError(
            f"no image gave a finite gradient ({total.not_finite} were tried): check the weights, or use float32"
        )
    if n is not None and total.count < n:
        logger.warning("%d images were asked for and %d could be used", n, total.count)
    if total.not_finite:
        logger.warning("%d images gave a gradient that is not finite and were left out", total.not_finite)


class _CentreGradients:
    """Maps a batch `[N, C, H, W]` to contributions `[N, H, W]`, one for each layer."""

    def __init__(
        self,
        model: nn.Module,
        feature_size: dict[str, tuple[int, int]],
        variant: Variant,
        score: Score,
        layout: Layout,
        dtype: torch.dtype,
        names: Sequence[str],
    ) -> None:
        self.model, self.names, self.variant, self.score = model, list(names), variant, score
        self.layout: Layout = layout
        self.dtype = dtype
        self.feature_size = feature_size
        self._hints = layout_hints(model)

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        x = x.requires_grad_()
        with torch.enable_grad():
            centres = self._centres(x) if self.feature_size else self._first_centres(x)
            return {name: self._contribution(x, centres[name], name == self.names[-1]) for name in self.names}

    def _first_centres(self, x: Tensor) -> dict[str, Tensor]:
        """The first pass, in which networks built for one size say that they cannot take another."""
        try:
            return self._centres(x)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError) as error:
            raise UsageError(
                f"{type(self.model).__name__} cannot run on images of {x.shape[2]} × {x.shape[3]}: {error}"
            ) from error

    def _centres(self, x: Tensor) -> dict[str, Tensor]:
        size, centres = (x.shape[2], x.shape[3]), {}

        def keep(name: str):
            def receive(output: Any) -> None:
                centres[name] = self._centre(name, output, size)

            return receive

        with ExitStack() as stack:
            stack.enter_context(_autocast(x.device, self.dtype))
            for name in self.names:
                stack.enter_context(record(self.model, name, keep(name)))
            whole = FORWARD_FEATURES if FORWARD_FEATURES in self.names else OUTPUT
            output = self.model.forward_features(x) if whole == FORWARD_FEATURES else self.model(x)  # pyright: ignore[reportCallIssue]
        if whole in self.names:
            centres[whole] = self._centre(whole, output, size)
        if missing := [name for name in self.names if name not in centres]:
            raise UsageError(f"the forward pass never calls {', '.join(missing)}")
        return centres

    def _centre(self, name: str, output: Any, size: tuple[int, int]) -> Tensor:
        try:
            features = to_feature_map(output, size, layout=self.layout, **self._hints)
        except ValueError as error:
            raise UsageError(f"layer {name!r}: {error}") from error
        h, w = features.shape[2:]
        self.feature_size[name] = (h, w)
        # A copy, because the next layer may overwrite the map in place (ReLU(inplace=True) behind a batch norm).
        return features[:, :, h // 2, w // 2].clone()

    def _contribution(self, x: Tensor, centre: Tensor, last: bool) -> Tensor:
        value = centre.relu() if self.score == "relu" else centre
        # Images do not interact in eval mode, so the batch's sum has each image's own gradient.
        gradient = None
        if value.requires_grad:
            gradient = torch.autograd.grad(value.sum(), x, retain_graph=not last, allow_unused=True)[0]
        if gradient is None:
            raise UsageError("the layer does not depend on the image; name a layer between input and output")
        return _PER_PIXEL[self.variant](gradient).sum(dim=1)


def _check_options(variant: str, score: str, n: int | None, batch_size: int) -> None:
    if variant not in get_args(Variant):
        raise UsageError(f"variant is one of {', '.join(get_args(Variant))}; got {variant!r}")
    if score not in get_args(Score):
        raise UsageError(f"score is one of {', '.join(get_args(Score))}; got {score!r}")
    if n is not None and n < 1:
        raise UsageError(f"n is a number of images of at least 1, or None; got {n}")
    if batch_size < 1:
        raise UsageError(f"batch_size is at least 1; got {batch_size}")


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")


def _input_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _autocast(device: torch.device, dtype: torch.dtype):
    if dtype in (torch.float32, torch.float64):
        return nullcontext()
    if dtype not in (torch.bfloat16, torch.float16):
        raise UsageError(f"dtype is float32, float64, bfloat16 or float16; got {dtype}")
    return torch.autocast(device.type, dtype)


@contextmanager
def _frozen(model: nn.Module, device: torch.device, dtype: torch.dtype, checkpointing: bool) -> Iterator[nn.Module]:
    """The model in eval mode, on the device, without parameter gradients; modes and flags are put back afterwards."""
    set_checkpointing = getattr(model, "set_grad_checkpointing", None)
    if checkpointing and set_checkpointing is None:
        raise UsageError(f"{type(model).__name__} offers no activation checkpointing; run without it")
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    stored = [
        (module, module.grad_checkpointing) for module in model.modules() if hasattr(module, "grad_checkpointing")
    ]
    try:
        model.to(device).eval().requires_grad_(False)
        if checkpointing and set_checkpointing is not None:
            set_checkpointing(True)
        yield copy.deepcopy(model).double() if dtype == torch.float64 else model
    finally:
        for module, value in stored:
            module.grad_checkpointing = value  # pyright: ignore[reportAttributeAccessIssue]
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _fingerprint(model: nn.Module, images: Any, tap: _CentreGradients, first: Tensor) -> dict[str, Any]:
    """What must agree for sums of two runs to be added. Batch size and device change rounding only and are left out."""
    first_digest = hashlib.sha256(first.cpu().contiguous().numpy().tobytes()).hexdigest()
    return {
        "weights": weights_digest(model),
        "images": str(getattr(images, "fingerprint", first_digest)),
        "layers": tap.names,
        "variant": tap.variant,
        "score": tap.score,
        "dtype": str(tap.dtype),
        "layout": tap.layout,
        "size": list(first.shape),
    }
