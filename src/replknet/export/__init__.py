"""From a model to a file that runs without this package, checked against the model before it gets its name."""

from replknet.export.exporter import ExportReport, check_precision, export_model
from replknet.export.formats import FORMATS, Format
from replknet.export.loading import Exported, load_exported
from replknet.export.quantization import PRECISIONS, Precision

__all__ = [
    "FORMATS",
    "PRECISIONS",
    "ExportReport",
    "Exported",
    "Format",
    "Precision",
    "check_precision",
    "export_model",
    "load_exported",
]
