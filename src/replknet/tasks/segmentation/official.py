"""Configs of the release's five segmentors, by the names of their weights, for use without a recipe file."""

from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmseg.utils import get_classes, get_palette

from replknet._errors import UsageError
from replknet.models.family import ARCHITECTURES
from replknet.models.weights import WEIGHTS, Weights

_RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def official_segmentor(weights: str | Path) -> Weights | None:
    """The entry that a name, or the name of an official file, stands for; None for anything else.

    Raises:
        UsageError: official weights of another task.
    """
    named = WEIGHTS.get(str(weights))
    if named is not None and named.task != "segmentation":
        known = ", ".join(name for name, entry in WEIGHTS.items() if entry.task == "segmentation")
        raise UsageError(f"{weights} are weights for {named.task}; for segmentation there are {known}")
    if named is not None:
        return named
    file_name = Path(weights).name
    for entry in WEIGHTS.values():
        if entry.task == "segmentation" and any(source.file_name == file_name for source in entry.sources):
            return entry
    return None


def official_config(entry: Weights) -> Config:
    """Model and test pipelines that `entry` was trained and scored with, in the Runner's form."""
    classes, city = entry.num_classes, entry.trained_on[-1] == "Cityscapes"
    data = "cityscapes" if city else "ade"
    scale = (2049, 1025) if city else (2048, 512)
    return Config(
        {
            "default_scope": "mmseg",
            "model": upernet(
                entry.model,
                classes,
                mean=[255 * value for value in entry.mean],
                std=[255 * value for value in entry.std],
                crop=entry.input_size[1:],
                slide=entry.input_size[1] == 640,
                align_corners=city,
                norm_features=entry.model == "replknet_xl",
            ),
            "test_pipeline": plain_pipeline(scale),
            "tta_pipeline": tta_pipeline(scale),
            "tta_model": {"type": "SegTTAModel"},
            "metainfo": {"classes": [name.strip() for name in get_classes(data)], "palette": get_palette(data)},
        }
    )


def upernet(
    model: str,
    num_classes: int,
    *,
    mean: list[float],
    std: list[float],
    crop: tuple[int, int],
    slide: bool = False,
    align_corners: bool = False,
    norm_features: bool = False,
) -> dict[str, Any]:
    """UperNet with an auxiliary FCN head on stage 2, as in all of the release's configs.

    Args:
        model: a named RepLKNet.
        num_classes: outputs of both heads.
        mean: of the pixels, 0 to 255, red first.
        std: likewise.
        crop: height and width of training crops, and of the windows where `slide`.
        slide: test by overlapping windows, two thirds of a window apart.
        align_corners: of the heads' interpolation.
        norm_features: batch-normalise the maps that the backbone hands out.
    """
    norm = {"type": "SyncBN", "requires_grad": True}
    channels = list(ARCHITECTURES[model]["channels"])
    heads: dict[str, Any] = {
        "num_classes": num_classes,
        "norm_cfg": norm,
        "align_corners": align_corners,
        "dropout_ratio": 0.1,
    }
    return {
        "type": "EncoderDecoder",
        "data_preprocessor": {
            "type": "SegDataPreProcessor",
            "mean": mean,
            "std": std,
            "bgr_to_rgb": True,
            "pad_val": 0,
            "seg_pad_val": 255,
            "size": crop,
        },
        "backbone": {
            "type": "RepLKNet",
            "model": model,
            "out_indices": (0, 1, 2, 3),
            "norm_features": norm_features,
            "norm_cfg": norm,
        },
        "decode_head": {
            "type": "UPerHead",
            "in_channels": channels,
            "in_index": [0, 1, 2, 3],
            "pool_scales": (1, 2, 3, 6),
            "channels": 512,
            "loss_decode": _loss(1.0),
            **heads,
        },
        "auxiliary_head": {
            "type": "FCNHead",
            "in_channels": channels[2],
            "in_index": 2,
            "channels": 256,
            "num_convs": 1,
            "concat_input": False,
            "loss_decode": _loss(0.4),
            **heads,
        },
        "train_cfg": {},
        "test_cfg": {"mode": "slide", "crop_size": crop, "stride": tuple(side * 2 // 3 for side in crop)}
        if slide
        else {"mode": "whole"},
    }


def plain_pipeline(scale: tuple[int, int]) -> list[dict[str, Any]]:
    """Resize to fit `scale` (width, height), keeping the ratio."""
    return [
        {"type": "LoadImageFromFile"},
        {"type": "Resize", "scale": scale, "keep_ratio": True},
        {"type": "PackSegInputs"},
    ]


def tta_pipeline(scale: tuple[int, int]) -> list[dict[str, Any]]:
    """Six sizes around `scale`, each with its mirror image: the release's multi-scale test."""
    sizes = [(int(scale[0] * ratio), int(scale[1] * ratio)) for ratio in _RATIOS]
    flips = [{"type": "RandomFlip", "prob": prob, "direction": "horizontal"} for prob in (0.0, 1.0)]
    resizes = [{"type": "Resize", "scale": size, "keep_ratio": True} for size in sizes]
    return [
        {"type": "LoadImageFromFile"},
        {"type": "TestTimeAug", "transforms": [resizes, flips, [{"type": "PackSegInputs"}]]},
    ]


def _loss(weight: float) -> dict[str, Any]:
    return {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": weight}


def published_size(entry: Weights) -> tuple[int, int]:
    """Height and width at which the published FLOPs come out.

    The release's table says 2048x512 for Cityscapes as for the other 1K weights; its figure is that of 2048x1024, twice
    as many pixels.
    """
    assert entry.published_cost is not None
    return (1024, 2048) if entry.trained_on[-1] == "Cityscapes" else entry.published_cost[2]
