"""Numbers of fewer bits: half precision inside the module, int8 by onnxruntime."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from replknet._errors import UsageError

Precision = Literal["fp32", "fp16", "bf16", "int8-dynamic", "int8-static"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Plain(nn.Module):
    """Images in float32 in, tensors in float32 out, whatever the model inside computes in.

    Lists and dictionaries of tensors become tuples: exported files know nothing else.
    """

    def __init__(self, model: nn.Module, precision: Precision):
        super().__init__()
        self.dtype = _DTYPES.get(precision, torch.float32)
        self.model = model.to(self.dtype)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """`[N, C, H, W]` float32 to the model's outputs."""
        outputs = tuple(output.float() for output in as_tensors(self.model(images.to(self.dtype))))
        return outputs[0] if len(outputs) == 1 else outputs


def as_tensors(output: Any) -> tuple[Tensor, ...]:
    """The tensors of a model's output, in order."""
    if isinstance(output, Tensor):
        return (output,)
    values = output.values() if isinstance(output, dict) else output
    if not isinstance(values, (list, tuple)) and not isinstance(output, dict):
        raise UsageError(f"only models that return tensors can be exported; this one returns {type(output).__name__}")
    return tuple(tensor for value in values for tensor in as_tensors(value))


def quantize_int8(source: Path, target: Path, precision: Precision, calibration: Tensor) -> None:
    """Write an int8 copy of an fp32 ONNX file.

    Args:
        source: fp32 file.
        target: the int8 file.
        precision: "int8-dynamic" quantizes activations at run time; "int8-static" by ranges seen on `calibration`,
            weights per output channel.
        calibration: `[N, C, H, W]` float32, prepared images.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = source.with_suffix(".prepared.onnx")
    with _quiet():
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        if precision == "int8-dynamic":
            # onnxruntime's integer convolution takes weights with a zero point only.
            quantize_dynamic(prepared, target, weight_type=QuantType.QUInt8)
        else:
            quantize_static(
                prepared,
                target,
                _reader(calibration),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                weight_type=QuantType.QInt8,
                activation_type=QuantType.QInt8,
            )
    prepared.unlink()


def _reader(images: Tensor) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(images.split(1))

        def get_next(self) -> dict | None:  # type: ignore[override]
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    return Reader()


@contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime's quantizer warns on the root logger about each step it takes."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
