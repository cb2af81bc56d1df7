"""Export, check, and only then give the file its name."""

import copy
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from replknet._errors import RunError, UsageError
from replknet._files import make_folder
from replknet.export.formats import FORMATS, SUFFIXES, Format, dynamic_shapes, require_packages, writer_of
from replknet.export.loading import Exported, load_exported
from replknet.export.quantization import PRECISIONS, Plain, Precision, as_tensors, quantize_int8
from replknet.layers import reparameterize

# Largest difference from the fp32 model, relative to the largest output. fp32 covers merging, folding of batch norms
# and another order of summation; int8 has no figure that fits every network, so it is reported and not judged.
TOLERANCES: dict[Precision, float | None] = {
    "fp32": 1e-4,
    "fp16": 2e-2,
    "bf16": 1e-1,
    "int8-dynamic": None,
    "int8-static": None,
}


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far it is from the model on the images it was checked on."""

    path: Path
    format: Format
    precision: Precision
    bytes: int
    images: int
    max_difference: float
    """Largest absolute difference from the fp32 model before merging, over all outputs."""
    scale: float
    """Largest absolute output of that model."""
    tolerance: float | None
    """Allowed `max_difference / scale`; None: not judged."""
    agreement: float
    """Share of argmaxes over dimension 1 that are equal."""
    accuracy: float | None
    """Top-1 of the file on labelled images."""
    model_accuracy: float | None
    """Top-1 of the model on the same images."""
    milliseconds: float
    """Median time of the file for one image, on the machine that exported it."""
    model_milliseconds: float
    """The model's, eager, before merging."""


def export_model(
    model: nn.Module,
    path: str | Path,
    images: Tensor,
    *,
    format: Format = "onnx",  # noqa: A002 - the command line's own word
    precision: Precision = "fp32",
    labels: Tensor | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    merge: bool = True,
    tolerance: float | None = None,
    metadata: dict[str, Any] | None = None,
) -> ExportReport:
    """Write `model` to `path` and hold the written file against the model.

    The model itself stays as it is. The file is loaded afresh and run on `images` in batches of one and of all of them
    (and at another size where size is open); it gets its name only if it is within the tolerance.

    Args:
        model: maps `[N, C, H, W]` to a tensor, or a list, tuple or dict of tensors; it is exported in evaluation mode.
        path: the file; an existing one is replaced.
        images: `[N, C, H, W]` float32, real pictures as the model expects them; also the calibration set of
            "int8-static".
        format: "onnx", "torch-export" (.pt2 with a graph), "aotinductor" (.pt2 with machine code for this kind of
            machine), or "torchscript".
        precision: of the arithmetic inside; inputs and outputs stay float32. int8 exists for onnx.
        labels: `[N]` class indices, or None.
        dynamic_batch: leave the batch size open.
        dynamic_size: leave height and width open.
        merge: merge re-parameterised branches and fold batch norms first.
        tolerance: allowed difference relative to the largest output; None: 1e-4 for fp32, 2e-2 for fp16, 1e-1 for
            bf16, not judged for int8.
        metadata: JSON-serialisable description kept inside the file.

    Raises:
        UsageError: unknown or impossible combination, missing packages.
        RunError: the model cannot be exported, or the file is not within the tolerance; nothing is left behind.
    """
    check_precision(format, precision)
    _check_images(images, labels)
    require_packages(format)
    path = Path(path)
    make_folder(path.parent)
    limit = TOLERANCES[precision] if tolerance is None else tolerance
    original = copy.deepcopy(model).cpu().float().eval()
    shapes = dynamic_shapes(batch=dynamic_batch, size=dynamic_size)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        written = Path(folder) / (path.name if path.name.endswith(SUFFIXES[format]) else path.name + SUFFIXES[format])
        _write(original, written, images, format, precision, shapes, merge, metadata or {})
        exported = load_exported(written, format=format)
        report = _check(original, exported, images, labels, path, precision, limit, shapes)
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == written):  # the graph comes last
            os.replace(file, path if file == written else path.parent / file.name)
    return report


def check_precision(format: Format, precision: Precision) -> None:  # noqa: A002
    """Raise UsageError unless `format` can be written in `precision`."""
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    if precision.startswith("int8") and format != "onnx":
        raise UsageError(f"{precision} exists for --format onnx only, not for {format}")
    if precision == "bf16" and format == "onnx":
        raise UsageError("onnxruntime runs no bf16 convolutions on the CPU, so the file could not be checked; use fp16")


def _check_images(images: Tensor, labels: Tensor | None) -> None:
    if images.ndim != 4 or len(images) < 2 or images.dtype != torch.float32:
        raise UsageError(
            f"images must be at least two float32 pictures [N, C, H, W]; got {images.dtype} {list(images.shape)}"
        )
    if labels is not None and labels.shape != images.shape[:1]:
        raise UsageError(f"{len(images)} images and labels of shape {list(labels.shape)}")


def _write(
    original: nn.Module,
    path: Path,
    images: Tensor,
    format: Format,  # noqa: A002
    precision: Precision,
    shapes: dict[int, Any],
    merge: bool,
    metadata: dict[str, Any],
) -> None:
    model = copy.deepcopy(original)
    if merge:
        model = reparameterize(model)
    plain = Plain(model, precision).eval().requires_grad_(False)
    # An open batch is traced with two images: torch.export takes a dimension of one for a constant.
    example = images[:2] if 0 in shapes else images[:1]
    metadata = {**metadata, "precision": precision}
    if not precision.startswith("int8"):
        writer_of(format)(plain, path, example, shapes, metadata)
        return
    whole = path.with_name("fp32.onnx")
    writer_of(format)(plain, whole, example, shapes, metadata)
    quantize_int8(whole, path, precision, images)
    for file in path.parent.glob("fp32.onnx*"):
        file.unlink()


def _check(
    original: nn.Module,
    exported: Exported,
    images: Tensor,
    labels: Tensor | None,
    path: Path,
    precision: Precision,
    limit: float | None,
    shapes: dict[int, Any],
) -> ExportReport:
    got, want = _outputs(exported, images, shapes), _outputs(original, images, shapes)
    finite = all(bool(output.isfinite().all()) for output in got)
    difference = max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))
    scale = max(float(output.abs().max()) for output in want)
    if not finite or (limit is not None and not difference <= limit * scale):
        found = f"differs by {difference:.3g}" if finite else "gives infinite or undefined values"
        allowed = "" if limit is None else f"; allowed is {limit:.3g} of {scale:.3g}"
        raise RunError(f"{exported.format} in {precision} {found} from the model on {len(images)} images{allowed}")
    answers, right = got[0].argmax(1), want[0].argmax(1)
    return ExportReport(
        path=path,
        format=exported.format,
        precision=precision,
        bytes=sum(file.stat().st_size for file in exported.path.parent.iterdir()),
        images=len(images),
        max_difference=difference,
        scale=scale,
        tolerance=limit,
        agreement=float((answers == right).double().mean()),
        accuracy=None if labels is None else float((answers == labels).double().mean()),
        model_accuracy=None if labels is None else float((right == labels).double().mean()),
        milliseconds=_milliseconds(exported, images[:1]),
        model_milliseconds=_milliseconds(original, images[:1]),
    )


@torch.no_grad()
def _outputs(model: Any, images: Tensor, shapes: dict[int, Any]) -> list[Tensor]:
    """Outputs for all images one by one, in one batch where it is open, and at another size where that is open."""
    singles = [as_tensors(model(image)) for image in images.split(1)]
    outputs = [torch.cat(parts).float() for parts in zip(*singles, strict=True)]
    if 0 in shapes:
        outputs += [output.float() for output in as_tensors(model(images))]
    if 2 in shapes:
        height, width = (side + 32 for side in images.shape[2:])
        larger = torch.nn.functional.interpolate(images[:1], size=(height + 32, width), mode="bilinear")
        outputs += [output.float() for output in as_tensors(model(larger))]
    return outputs


@torch.no_grad()
def _milliseconds(model: Any, images: Tensor, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        model(images)
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2] * 1e3
