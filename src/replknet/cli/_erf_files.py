"""What `replknet erf` writes and prints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from replknet._errors import UsageError
from replknet._files import replacing, write_text
from replknet.analysis.erf import ErfResult
from replknet.analysis.erf_measures import Area, measure
from replknet.analysis.erf_record import LOG_WARNING, record, warnings_about
from replknet.analysis.images import PreparedImages
from replknet.analysis.receptive_field import ReceptiveField, theoretical_receptive_field
from replknet.cli._options import file_stem
from replknet.plotting import erf as figures


class Entry:
    """One measured layer of one network, and everything that is said about it."""

    def __init__(self, label: str, result: ErfResult, model: nn.Module, how: dict[str, Any]) -> None:
        self.label, self.result, self.how = label, result, how
        self.measures = measure(result.matrix)
        self.field = _theoretical(model, result, in_chans=_in_chans(model))
        self.warnings: list[str] = []

    def warn(self, *, trained: bool, shuffled: bool, same: bool, silent: int) -> None:
        """Collect the traps; `same`: the network's own normalisation was used."""
        self.warnings = warnings_about(
            self.result, self.measures, trained=trained, shuffled=shuffled, own_normalisation=same, silent=silent
        )


class OutputFolder:
    """The results' folder: every file is complete or absent."""

    def __init__(self, path: str, figure_format: str, scale: Any) -> None:
        self.path, self._format, self._scale = Path(path).expanduser(), figure_format, scale
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--output {self.path}: a file, where a folder is needed")

    def write(self, entry: Entry) -> None:
        """Matrix, account and heatmap of one entry."""
        stem = file_stem(entry.label)
        with replacing(self.path / f"{stem}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, entry.result.matrix)
        account = record(entry.result, entry.measures, entry.field, entry.how, [*entry.warnings, LOG_WARNING])
        write_text(self.path / f"{stem}.json", json.dumps(account, indent=1) + "\n")
        figure = figures.heatmap(entry.result, scale=self._scale, title=entry.label)
        figures.save(figure, self.path / f"{stem}.{self._format}")

    def overlay(self, entry: Entry, images: PreparedImages) -> None:
        """The entry's field over the first picture that was used."""
        figure = figures.overlay(entry.result, images.picture(images.used[0])[..., :3], title=entry.label)
        figures.save(figure, self.path / f"{file_stem(entry.label)}_overlay.{self._format}")

    def compare(self, entries: list[Entry]) -> None:
        """Radial profiles, and the heatmaps of several entries on one scale."""
        matrices = {entry.label: entry.result for entry in entries}
        figures.save(figures.radial_profiles(matrices), self.path / f"profiles.{self._format}")
        if len(entries) > 1:
            figures.save(figures.grid(matrices, scale=self._scale), self.path / f"grid.{self._format}")


def table(entries: list[Entry]) -> str:
    """Area ratios in percent, raw and log, σ and the theoretical field."""
    thresholds = [f"{area.threshold:.0%}" for area in entries[0].measures.raw]
    head = [
        "",
        "images",
        *[f"raw {name}" for name in thresholds],
        *[f"log {name}" for name in thresholds],
        "σ",
        "theory",
    ]
    rows = [head]
    for entry in entries:
        measures, gaussian = entry.measures, entry.measures.gaussian
        rows.append(
            [
                entry.label,
                str(entry.result.n_images),
                *[_percent(area) for area in (*measures.raw, *measures.log)],
                "–" if gaussian is None else f"{gaussian.sigma:.1f} px",
                _field(entry.field),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _percent(area: Area) -> str:
    return "–" if area.ratio is None else f"{100 * area.ratio:.1f}"


def _field(field: ReceptiveField | None) -> str:
    if field is None:
        return "?"
    return f"{field.size[0]:g} px" if field.bounded else "all"


def _in_chans(model: nn.Module) -> int:
    config = getattr(model, "pretrained_cfg", None) or {}
    return int(getattr(model, "in_chans", 0) or config.get("input_size", (3,))[0])


def _theoretical(model: nn.Module, result: ErfResult, in_chans: int) -> ReceptiveField | None:
    height, width = result.matrix.shape
    try:
        return theoretical_receptive_field(model, result.layer, image_size=(height, width), in_chans=in_chans)
    except UsageError:
        # A comparison that cannot be had (an operation without a meta kernel) spoils nothing else.
        return None
