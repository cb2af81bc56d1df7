"""Running an exported file: the same call for every format."""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replknet._errors import RunError, UsageError
from replknet.export.formats import FORMATS, METADATA, SUFFIXES, Format, require_packages


@dataclass(frozen=True)
class Exported:
    """A loaded file. `exported(images)` maps float32 `[N, C, H, W]` to the model's output, or a tuple of outputs."""

    path: Path
    format: Format
    metadata: dict[str, Any]
    """What the exporter wrote: `name`, `mean`, `std`, `input_size`, `crop_pct`, `crop_mode`, `class_names`, ..."""
    run: Callable[[Tensor], Sequence[Tensor]]

    def __call__(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Outputs in float32."""
        outputs = tuple(self.run(images))
        return outputs[0] if len(outputs) == 1 else outputs


def load_exported(path: str | Path, *, format: Format | None = None, threads: int = 0) -> Exported:  # noqa: A002
    """Open a file written by `export_model`.

    Args:
        path: the file.
        format: how to read it; None: by its suffix.
        threads: of onnxruntime on the CPU; 0: its own choice.

    Raises:
        UsageError: no such file, or a suffix that says nothing.
        RunError: the file is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    kind = format or _format_of(path)
    require_packages(kind)
    try:
        if kind == "onnx":
            return _load_onnx(path, threads)
        loaders = {"torch-export": _load_program, "aotinductor": _load_package, "torchscript": _load_script}
        return loaders[kind](path)
    except Exception as error:
        # Each runtime has its own exceptions for a damaged file, some of them not even RuntimeErrors.
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"{path} cannot be read as {kind}: {cause}") from error


def _format_of(path: Path) -> Format:
    for kind in sorted(FORMATS, key=lambda kind: -len(SUFFIXES[kind])):
        if path.name.endswith(SUFFIXES[kind]):
            return kind
    raise UsageError(f"{path.name}: cannot tell its format; known endings: {', '.join(SUFFIXES.values())}")


def _load_onnx(path: Path, threads: int) -> Exported:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    metadata = json.loads(session.get_modelmeta().custom_metadata_map.get(METADATA, "{}"))

    def run(images: Tensor) -> Sequence[Tensor]:
        outputs = session.run(None, {session.get_inputs()[0].name: images.cpu().contiguous().numpy()})
        return [torch.from_numpy(output) for output in outputs]

    return Exported(path, "onnx", metadata, run)


def _load_program(path: Path) -> Exported:
    extra = {METADATA: ""}
    module = torch.export.load(path, extra_files=extra).module()
    return Exported(path, "torch-export", json.loads(extra[METADATA] or "{}"), _runner(module))


def _load_package(path: Path) -> Exported:
    module = torch._inductor.aoti_load_package(str(path))
    return Exported(path, "aotinductor", json.loads(module.get_metadata().get(METADATA, "{}")), _runner(module))


def _load_script(path: Path) -> Exported:
    extra = {METADATA: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.load(str(path), _extra_files=extra)
    return Exported(path, "torchscript", json.loads(extra[METADATA] or "{}"), _runner(module))


def _runner(module: Any) -> Callable[[Tensor], Sequence[Tensor]]:
    @torch.no_grad()
    def run(images: Tensor) -> Sequence[Tensor]:
        output = module(images)
        return [output] if isinstance(output, Tensor) else list(output)

    return run
