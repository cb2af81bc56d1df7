"""What is written about a measured effective receptive field: the numbers, how to redo it, and what to beware of."""

import math
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch

from replknet.analysis.erf import ErfResult
from replknet.analysis.erf_measures import Area, Measures
from replknet.analysis.receptive_field import ReceptiveField

RELEASE_SIZE = 1024
RELEASE_IMAGES = 50
_SMALL_SIZE = 512


def record(
    result: ErfResult, measures: Measures, field: ReceptiveField | None, how: Mapping[str, Any], warnings: Sequence[str]
) -> dict[str, Any]:
    """JSON-ready account of one result.

    Args:
        result: the matrix is not part of the account.
        measures: of the result's matrix.
        field: the layer's theoretical receptive field, None where it could not be traced.
        how: model, images and settings.
        warnings: see `warnings_about`.
    """
    height, width = result.matrix.shape
    return {
        "area_ratios": {"raw": _areas(measures.raw), "log": _areas(measures.log)},
        "gaussian": None
        if measures.gaussian is None
        else {**vars(measures.gaussian), "sigma": measures.gaussian.sigma},
        "radius_of_half": measures.radial.radius_of(0.5),
        "support": measures.support,
        "centroid": measures.centroid,
        "largest": float(result.matrix.max()),
        "theoretical": _theoretical(field, measures, (height, width)),
        "layer": result.layer,
        "feature_size": result.feature_size,
        "image_size": (height, width),
        "variant": result.variant,
        "score": result.score,
        "n_images": result.n_images,
        "n_not_finite": result.n_not_finite,
        **how,
        "warnings": list(warnings),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what computes."""
    from replknet import __version__

    return {
        "replknet": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def warnings_about(
    result: ErfResult, measures: Measures, *, trained: bool, shuffled: bool, own_normalisation: bool, silent: int
) -> list[str]:
    """The traps that this measurement may have walked into, in words for its reader.

    Args:
        result: the measurement.
        measures: of its matrix.
        trained: False for random weights.
        shuffled: False where the pictures came in their collection's order.
        own_normalisation: whether the images were normalised as the network's training images were.
        silent: scales that are zero, see `replknet erf`.
    """
    height, width = result.matrix.shape
    side = min(height, width)
    last = measures.raw[-1]
    found = []
    if side < _SMALL_SIZE:
        found.append(
            f"{height} × {width} pixels are few: rankings of networks can turn round at small inputs; the paper "
            f"measures at {RELEASE_SIZE} × {RELEASE_SIZE}"
        )
    if last.side is None or last.side > 0.97 * side:
        found.append(
            f"the image cuts the field off ({last.threshold:.0%} of it fill the picture): ratios of large fields are "
            "too small; use a larger size"
        )
    if not trained:
        found.append(
            "the weights are random, which says nothing of the trained network: untrained ResNets, for one, are known "
            "to show larger fields than trained ones"
        )
    if silent:
        found.append(
            f"{silent} norm or layer scales are zero or nearly so, which silences the branches behind them; many "
            "networks start like this and then show only their stem and shortcuts (zero_init_last:=false in timm's "
            "ResNets)"
        )
    if not shuffled:
        found.append("the pictures came in their folder's order, whose first ones are all of one class")
    if not own_normalisation:
        found.append("the network was trained with another mean and standard deviation; see --normalize")
    if result.n_images < RELEASE_IMAGES and trained:
        found.append(f"{result.n_images} images are few: the paper averages {RELEASE_IMAGES}")
    if result.n_not_finite:
        found.append(f"{result.n_not_finite} images gave no finite gradient and are not part of the average")
    return found


LOG_WARNING = (
    "ratios of the log matrix depend on the gradient's scale: compare them only between networks of like scale, and "
    "the raw ratios otherwise"
)


def _areas(areas: Sequence[Area]) -> dict[str, dict[str, float | int | None]]:
    return {f"{area.threshold:g}": {"side": area.side, "ratio": area.ratio} for area in areas}


def _theoretical(field: ReceptiveField | None, measures: Measures, image: tuple[int, int]) -> dict[str, Any] | None:
    """Theoretical field, and the effective one's share of it: sides of the 50 % square, or 2σ on each side."""
    if field is None:
        return None
    if not field.bounded:
        return {"bounded": False, "size": None, "stride": field.stride}
    shares: dict[str, float | None] = {}
    inside = [min(side, limit) for side, limit in zip(field.size, image, strict=True)]
    for area in measures.raw:
        shares[f"{area.threshold:g}"] = None if area.side is None else area.side**2 / math.prod(field.size)
    return {
        "bounded": True,
        "size": field.size,
        "stride": field.stride,
        "size_inside_image": inside,
        "effective_share_of_area": shares,
    }
