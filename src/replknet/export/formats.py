"""One writer a format. A writer gets a module that maps one image tensor to a tensor or a tuple of tensors."""

import importlib.util
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from replknet._errors import RunError, UsageError

Format = Literal["onnx", "torch-export", "aotinductor", "torchscript"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES: dict[Format, str] = {
    "onnx": ".onnx",
    "torch-export": ".pt2",
    "aotinductor": ".aoti.pt2",
    "torchscript": ".torchscript",
}
METADATA = "replknet.json"
"""Name of the description inside a file: preparation of the images, class names, precision."""

OPSET = 20
# A protobuf message ends at 2 GiB; larger weights go to a second file beside the graph.
_PROTOBUF_LIMIT = 1_900_000_000

DynamicShapes = dict[int, Any]
Writer = Callable[[nn.Module, Path, Tensor, DynamicShapes, dict[str, Any]], None]


def require_packages(format: Format) -> None:  # noqa: A002 - the command line's own word
    """Raise UsageError with the command that helps unless the packages of `format` are installed."""
    if format != "onnx":
        return
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"exporting to ONNX needs {', '.join(missing)}: pip install 'replknet[export]'")


def dynamic_shapes(*, batch: bool, size: bool) -> DynamicShapes:
    """Which dimensions of `[N, C, H, W]` stay open."""
    shapes: DynamicShapes = {}
    if batch:
        shapes[0] = torch.export.Dim("batch", min=1, max=65536)
    if size:
        shapes |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    return shapes


def writer_of(format: Format) -> Writer:  # noqa: A002
    """The function that writes `format`."""
    writers: dict[Format, Writer] = {
        "onnx": _write_onnx,
        "torch-export": _write_torch_export,
        "aotinductor": _write_aotinductor,
        "torchscript": _write_torchscript,
    }
    return writers[format]


def _program(model: nn.Module, example: Tensor, shapes: DynamicShapes) -> torch.export.ExportedProgram:
    with torch.no_grad():
        try:
            program = torch.export.export(model, (example,), dynamic_shapes=(shapes,), strict=False)
        except Exception as error:
            # torch raises anything from UserError to internal assertions here; the first line names the cause.
            cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            hint = "; without dynamic size it may work" if 2 in shapes else ""
            raise RunError(f"torch.export cannot follow this model: {cause}{hint}") from error
    own = sorted({str(node.target) for node in program.graph.nodes if "replknet" in str(node.target)})
    if own:
        raise RunError(f"the exported graph holds operators that other software does not know: {', '.join(own)}")
    return program


def _write_onnx(
    model: nn.Module, path: Path, example: Tensor, shapes: DynamicShapes, metadata: Mapping[str, Any]
) -> None:
    import onnx

    program = _program(model, example, shapes)
    outputs = [spec.arg.name for spec in program.graph_signature.output_specs]
    names = ["output"] if len(outputs) == 1 else [f"output_{index}" for index in range(len(outputs))]
    weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    external = weight_bytes > _PROTOBUF_LIMIT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            program,
            f=path,
            input_names=["images"],
            output_names=names,
            opset_version=OPSET,
            external_data=external,
            verbose=False,
        )
    proto = onnx.load(path, load_external_data=False)
    _name_open_dimensions(proto, shapes)
    _strip_traces(proto)
    entry = proto.metadata_props.add()
    entry.key, entry.value = METADATA, json.dumps(metadata)
    onnx.save(proto, path)
    onnx.checker.check_model(str(path))


def _name_open_dimensions(proto: Any, shapes: DynamicShapes) -> None:
    """Call the open dimensions batch, height and width: the exporter numbers them."""
    names = {0: "batch", 2: "height", 3: "width"}
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    renamed = {dims[axis].dim_param: names[axis] for axis in shapes if dims[axis].dim_param}
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in renamed:
                dim.dim_param = renamed[dim.dim_param]


def _strip_traces(proto: Any) -> None:
    """Leave out where in the exporting machine's files each node came from."""
    for item in (*proto.graph.node, *proto.graph.initializer, *proto.graph.value_info, *proto.graph.input):
        del item.metadata_props[:]
        item.doc_string = ""


def _write_torch_export(
    model: nn.Module, path: Path, example: Tensor, shapes: DynamicShapes, metadata: Mapping[str, Any]
) -> None:
    torch.export.save(_program(model, example, shapes), path, extra_files={METADATA: json.dumps(metadata)})


def _write_aotinductor(
    model: nn.Module, path: Path, example: Tensor, shapes: DynamicShapes, metadata: Mapping[str, Any]
) -> None:
    configs = {"aot_inductor.metadata": {METADATA: json.dumps(metadata)}}
    program = _program(model, example, shapes)
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)
    except Exception as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"AOTInductor cannot compile this model here (it needs a C++ compiler): {cause}") from error


def _write_torchscript(
    model: nn.Module, path: Path, example: Tensor, shapes: DynamicShapes, metadata: Mapping[str, Any]
) -> None:
    # A trace keeps every dimension open that the model's own code does not fix; torch calls it deprecated.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = cast(torch.jit.ScriptModule, torch.jit.trace(model, example, check_trace=False))
        own = [line.strip() for line in str(traced.inlined_graph).splitlines() if "replknet::" in line]
        if own:
            raise RunError(f"the traced graph holds operators that other software does not know: {own[0]}")
        torch.jit.save(torch.jit.freeze(traced), str(path), _extra_files={METADATA: json.dumps(metadata)})
