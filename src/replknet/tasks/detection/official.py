"""The release's five detectors by the names of their weights, and the two architectures for any RepLKNet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset
from mmengine.config import Config

from replknet._errors import UsageError
from replknet.models.family import ARCHITECTURES
from replknet.models.weights import WEIGHTS, Weights

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
# COCO numbers its 80 classes from 1 to 90, with gaps where classes were dropped before the release.
_DROPPED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_CATEGORY_IDS = tuple(number for number in range(1, 91) if number not in _DROPPED)
# Deviations of the box coders and IoU thresholds of the three stages.
_STAGES = (
    ([0.1, 0.1, 0.2, 0.2], 0.5),
    ([0.05, 0.05, 0.1, 0.1], 0.6),
    ([0.033, 0.033, 0.067, 0.067], 0.7),
)


def official_detector(weights: str | Path) -> Weights | None:
    """The entry that a name, or the name of an official file, stands for; None for anything else.

    Raises:
        UsageError: official weights of another task.
    """
    named = WEIGHTS.get(str(weights))
    if named is not None and named.task != "detection":
        known = ", ".join(name for name, entry in WEIGHTS.items() if entry.task == "detection")
        raise UsageError(f"{weights} are weights for {named.task}; for detection there are {known}")
    if named is not None:
        return named
    entries = [entry for entry in WEIGHTS.values() if entry.task == "detection"]
    name = Path(weights).name
    return next((entry for entry in entries if any(source.file_name == name for source in entry.sources)), None)


def official_config(entry: Weights) -> Config:
    """Model and test pipeline that `entry` was trained and scored with, in the Runner's form."""
    pixels: dict[str, Any] = {
        "mean": [round(255 * value, 3) for value in entry.mean],
        "std": [round(255 * value, 3) for value in entry.std],
    }
    make = fcos if entry.method == "FCOS" else cascade_mask_rcnn
    model = make(entry.model, entry.num_classes, norm_features=entry.model == "replknet_xl", **pixels)
    return Config(
        {
            "default_scope": "mmdet",
            "model": model,
            "test_pipeline": plain_pipeline((1333, 800)),
            "metainfo": coco_meta(),
        }
    )


def coco_meta() -> dict[str, Any]:
    """COCO's class names and category ids."""
    return {"classes": list(CocoDataset.METAINFO["classes"]), "category_ids": list(COCO_CATEGORY_IDS)}


def fcos(
    model: str,
    num_classes: int,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    norm_features: bool = False,
    norm: str = "SyncBN",
) -> dict[str, Any]:
    """FCOS as the release has it. Tian et al. 2019, arXiv:1904.01355.

    FPN from stride 8, group norm in the head, no centre sampling, IoU loss, centreness on the classification branch.

    Args:
        model: a named RepLKNet.
        num_classes: of the objects.
        mean: of the pixels, 0 to 255, red first.
        std: likewise.
        norm_features: batch-normalise the maps that the backbone hands out.
        norm: of the backbone, "SyncBN" or "BN".
    """
    return {
        "type": "FCOS",
        "data_preprocessor": _preprocessor(mean, std),
        "backbone": _backbone(model, norm_features, norm),
        "neck": {
            "type": "FPN",
            "in_channels": list(ARCHITECTURES[model]["channels"]),
            "out_channels": 256,
            "start_level": 1,
            "add_extra_convs": "on_output",
            "num_outs": 5,
            "relu_before_extra_convs": True,
        },
        "bbox_head": {
            "type": "FCOSHead",
            "num_classes": num_classes,
            "in_channels": 256,
            "stacked_convs": 4,
            "feat_channels": 256,
            "strides": [8, 16, 32, 64, 128],
            "loss_cls": {
                "type": "FocalLoss",
                "use_sigmoid": True,
                "gamma": 2.0,
                "alpha": 0.25,
                "loss_weight": 1.0,
            },
            "loss_bbox": {"type": "IoULoss", "loss_weight": 1.0},
            "loss_centerness": _cross_entropy(use_sigmoid=True),
        },
        "test_cfg": {
            "nms_pre": 1000,
            "min_bbox_size": 0,
            "score_thr": 0.05,
            "nms": {"type": "nms", "iou_threshold": 0.5},
            "max_per_img": 100,
        },
    }


def cascade_mask_rcnn(
    model: str,
    num_classes: int,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    norm_features: bool = False,
    norm: str = "SyncBN",
) -> dict[str, Any]:
    """Cascade Mask R-CNN as the release has it. Cai & Vasconcelos 2019, arXiv:1906.09756.

    Box heads of four convolutions with batch norm and one linear layer, GIoU loss on decoded boxes.

    Args:
        model, num_classes, mean, std, norm_features: as for `fcos`.
        norm: of backbone and box heads, "SyncBN" or "BN".
    """
    return {
        "type": "CascadeRCNN",
        "data_preprocessor": _preprocessor(mean, std) | {"pad_mask": True},
        "backbone": _backbone(model, norm_features, norm),
        "neck": {
            "type": "FPN",
            "in_channels": list(ARCHITECTURES[model]["channels"]),
            "out_channels": 256,
            "num_outs": 5,
        },
        "rpn_head": _rpn_head(),
        "roi_head": {
            "type": "CascadeRoIHead",
            "num_stages": len(_STAGES),
            "stage_loss_weights": [1, 0.5, 0.25],
            "bbox_roi_extractor": _roi_extractor(7),
            "bbox_head": [_box_head(num_classes, deviations, norm) for deviations, _ in _STAGES],
            "mask_roi_extractor": _roi_extractor(14),
            "mask_head": {
                "type": "FCNMaskHead",
                "num_convs": 4,
                "in_channels": 256,
                "conv_out_channels": 256,
                "num_classes": num_classes,
                "loss_mask": {"type": "CrossEntropyLoss", "use_mask": True, "loss_weight": 1.0},
            },
        },
        "train_cfg": {
            "rpn": _rpn_training(),
            "rpn_proposal": _proposals(2000),
            "rcnn": [_roi_training(iou) for _, iou in _STAGES],
        },
        "test_cfg": {
            "rpn": _proposals(1000),
            "rcnn": {
                "score_thr": 0.05,
                "nms": {"type": "nms", "iou_threshold": 0.5},
                "max_per_img": 100,
                "mask_thr_binary": 0.5,
            },
        },
    }


def plain_pipeline(scale: tuple[int, int]) -> list[dict[str, Any]]:
    """Resize to fit into `scale` (long side, short side), keeping the ratio."""
    return [
        {"type": "LoadPicture"},
        {"type": "Resize", "scale": scale, "keep_ratio": True},
        {
            "type": "PackDetInputs",
            "meta_keys": ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
        },
    ]


def _preprocessor(mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    return {
        "type": "DetDataPreprocessor",
        "mean": list(mean),
        "std": list(std),
        "bgr_to_rgb": True,
        "pad_size_divisor": 32,
    }


def _backbone(model: str, norm_features: bool, norm: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "type": "RepLKNet",
        "model": model,
        "out_indices": (0, 1, 2, 3),
        "norm_cfg": {"type": norm},
    }
    return found | ({"norm_features": True} if norm_features else {})


def _rpn_head() -> dict[str, Any]:
    return {
        "type": "RPNHead",
        "in_channels": 256,
        "feat_channels": 256,
        "anchor_generator": {
            "type": "AnchorGenerator",
            "scales": [8],
            "ratios": [0.5, 1.0, 2.0],
            "strides": [4, 8, 16, 32, 64],
        },
        "bbox_coder": _coder([1.0, 1.0, 1.0, 1.0]),
        "loss_cls": _cross_entropy(use_sigmoid=True),
        "loss_bbox": {"type": "SmoothL1Loss", "beta": 1.0 / 9.0, "loss_weight": 1.0},
    }


def _box_head(num_classes: int, deviations: list[float], norm: str) -> dict[str, Any]:
    return {
        "type": "ConvFCBBoxHead",
        "num_shared_convs": 4,
        "num_shared_fcs": 1,
        "in_channels": 256,
        "conv_out_channels": 256,
        "fc_out_channels": 1024,
        "roi_feat_size": 7,
        "num_classes": num_classes,
        "bbox_coder": _coder(deviations),
        "reg_class_agnostic": False,
        "reg_decoded_bbox": True,
        "norm_cfg": {"type": norm, "requires_grad": True},
        "loss_cls": _cross_entropy(use_sigmoid=False),
        "loss_bbox": {"type": "GIoULoss", "loss_weight": 10.0},
    }


def _roi_extractor(size: int) -> dict[str, Any]:
    return {
        "type": "SingleRoIExtractor",
        "roi_layer": {"type": "RoIAlign", "output_size": size, "sampling_ratio": 0},
        "out_channels": 256,
        "featmap_strides": [4, 8, 16, 32],
    }


def _coder(deviations: list[float]) -> dict[str, Any]:
    return {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0, 0.0, 0.0, 0.0], "target_stds": deviations}


def _cross_entropy(*, use_sigmoid: bool) -> dict[str, Any]:
    return {"type": "CrossEntropyLoss", "use_sigmoid": use_sigmoid, "loss_weight": 1.0}


def _proposals(count: int) -> dict[str, Any]:
    return {
        "nms_pre": count,
        "max_per_img": count,
        "nms": {"type": "nms", "iou_threshold": 0.7},
        "min_bbox_size": 0,
    }


def _rpn_training() -> dict[str, Any]:
    return {
        "assigner": _assigner(0.7, 0.3, 0.3, match_low_quality=True),
        "sampler": _sampler(256, 0.5, add_gt_as_proposals=False),
        "allowed_border": 0,
        "pos_weight": -1,
        "debug": False,
    }


def _roi_training(iou: float) -> dict[str, Any]:
    return {
        "assigner": _assigner(iou, iou, iou, match_low_quality=False),
        "sampler": _sampler(512, 0.25, add_gt_as_proposals=True),
        "mask_size": 28,
        "pos_weight": -1,
        "debug": False,
    }


def _assigner(positive: float, negative: float, least: float, *, match_low_quality: bool) -> dict[str, Any]:
    return {
        "type": "MaxIoUAssigner",
        "pos_iou_thr": positive,
        "neg_iou_thr": negative,
        "min_pos_iou": least,
        "match_low_quality": match_low_quality,
        "ignore_iof_thr": -1,
    }


def _sampler(number: int, share: float, *, add_gt_as_proposals: bool) -> dict[str, Any]:
    return {
        "type": "RandomSampler",
        "num": number,
        "pos_fraction": share,
        "neg_pos_ub": -1,
        "add_gt_as_proposals": add_gt_as_proposals,
    }
