"""The official weights: one table of where every file comes from, how its images are prepared and what it scored.

Names are timm's: `MODEL.TAG`, for example `replknet_31b.in22k_ft_in1k_384`. Files are tried in the order of `sources`:
OpenMMLab's mirror (plain HTTPS, mmpretrain layout, hash in the name) before the release's Google Drive.

Sources: README of github.com/DingXiaoH/RepLKNet-pytorch (commit b76808a, MIT), Ding et al. 2022 (arXiv:2203.06717),
configs/replknet of github.com/open-mmlab/mmpretrain (Apache-2.0). File names marked "ours" follow the release's
pattern; it does not print them.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from replknet._errors import UsageError

Task = Literal["classification", "segmentation", "detection"]

RELEASE = "https://github.com/DingXiaoH/RepLKNet-pytorch"
PAPER = "arXiv:2203.06717"
LICENSE = "mit"
CITATION = """@inproceedings{ding2022replknet,
  title     = {Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs},
  author    = {Ding, Xiaohan and Zhang, Xiangyu and Han, Jungong and Ding, Guiguang},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  pages     = {11963--11975},
  year      = {2022}
}"""

_MIRROR = "https://download.openmmlab.com/mmclassification/v0/replknet/"
_DRIVE = "https://drive.google.com/uc?export=download&id="
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_INCEPTION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Source:
    """One place of one file."""

    url: str
    file_name: str
    """Name in the cache and in a folder of files put there by hand."""
    sha256_prefix: str | None = None
    """First hexadecimal digits of the file's SHA-256; None: the release names none."""
    size: int | None = None
    """Bytes, where known."""


@dataclass(frozen=True)
class Score:
    """A published result; `value` in per cent."""

    metric: str
    value: float
    dataset: str
    source: str


@dataclass(frozen=True)
class Weights:
    """One official set of weights."""

    model: str
    """timm name of the architecture (of the backbone, for segmentation and detection)."""
    tag: str
    task: Task
    sources: tuple[Source, ...]
    input_size: tuple[int, int, int]
    """Channels, height, width of the evaluation (of the training crop, for segmentation and detection)."""
    crop_pct: float
    crop_mode: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_classes: int
    trained_on: tuple[str, ...]
    """Data sets in the order of training."""
    scores: tuple[Score, ...] = ()
    method: str | None = None
    """Head or detector around the backbone; None for classification."""
    published_cost: tuple[float, float, tuple[int, int]] | None = None
    """Millions of parameters, 1e9 multiply-adds and the size (height, width) they were counted at, with head or
    detector, as the release prints them; those of classifiers are counted by `replknet.analysis.complexity`."""
    note: str | None = None

    @property
    def name(self) -> str:
        """`MODEL.TAG`."""
        return f"{self.model}.{self.tag}"


def _mirror(file_name: str) -> Source:
    return Source(_MIRROR + file_name, file_name, sha256_prefix=file_name.removesuffix(".pth").rsplit("-", 1)[1])


def _drive(file_id: str, file_name: str) -> Source:
    return Source(_DRIVE + file_id, file_name)


def _top1(value: float, reproduced: float | None = None) -> tuple[Score, ...]:
    scores = (Score("top-1", value, "ImageNet-1K", "release README"),)
    if reproduced is not None:
        scores += (Score("top-1", reproduced, "ImageNet-1K", "mmpretrain"),)
    return scores


def _classifier(
    model: str,
    tag: str,
    size: int,
    sources: tuple[Source, ...],
    trained_on: tuple[str, ...],
    scores: tuple[Score, ...] = (),
    *,
    num_classes: int = 1000,
    note: str | None = None,
) -> Weights:
    # The release resizes to the square without a crop from 384 on, and below crops the centre of size / 0.875.
    crop_pct, crop_mode = (1.0, "squash") if size >= 384 else (0.875, "center")
    mean, std = _INCEPTION if model == "replknet_xl" else _IMAGENET
    return Weights(
        model=model,
        tag=tag,
        task="classification",
        sources=sources,
        input_size=(3, size, size),
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        mean=mean,
        std=std,
        num_classes=num_classes,
        trained_on=trained_on,
        scores=scores,
        note=note,
    )


def _dense(
    model: str,
    tag: str,
    task: Task,
    source: Source,
    size: tuple[int, int],
    num_classes: int,
    method: str,
    trained_on: tuple[str, ...],
    scores: dict[str, float],
    published_cost: tuple[float, float, tuple[int, int]],
) -> Weights:
    mean, std = _INCEPTION if model == "replknet_xl" else _IMAGENET
    return Weights(
        model=model,
        tag=tag,
        task=task,
        sources=(source,),
        input_size=(3, *size),
        crop_pct=1.0,
        crop_mode="squash",
        mean=mean,
        std=std,
        num_classes=num_classes,
        trained_on=trained_on,
        scores=tuple(Score(metric, value, trained_on[-1], "release README") for metric, value in scores.items()),
        method=method,
        published_cost=published_cost,
    )


_1K, _22K, _73M = "ImageNet-1K", "ImageNet-22K", "MegData-73M"
_ADE, _CITY, _COCO = "ADE20K", "Cityscapes", "COCO"
_STUDY = "the score is that of the paper's 120-epoch kernel-size study; the release states none beside the file"

# The first entry of a model is its default tag in timm.
_CLASSIFICATION = (
    _classifier(
        "replknet_31b",
        "in1k_224",
        224,
        (
            _mirror("replknet-31B_3rdparty_in1k_20221118-fd08e268.pth"),
            _drive("1azQUiCxK9feYVkkrPqwVPBtNsTzDrX7S", "RepLKNet-31B_ImageNet-1K_224.pth"),
        ),
        (_1K,),
        _top1(83.5, 83.48),
    ),
    _classifier(
        "replknet_31b",
        "in1k_384",
        384,
        (
            _mirror("replknet-31B_3rdparty_in1k-384px_20221118-03a170ce.pth"),
            _drive("1vo-P3XB6mRLUeDzmgv90dOu73uCeLfZN", "RepLKNet-31B_ImageNet-1K_384.pth"),
        ),
        (_1K,),
        _top1(84.8, 84.84),
    ),
    _classifier(
        "replknet_31b",
        "in22k_ft_in1k_224",
        224,
        (
            _mirror("replknet-31B_in21k-pre_3rdparty_in1k_20221118-54ed5c46.pth"),
            _drive("1DslZ2voXZQR1QoFY9KnbsHAeF84hzS0s", "RepLKNet-31B_ImageNet-22K-to-1K_224.pth"),
        ),
        (_22K, _1K),
        _top1(85.2, 85.20),
    ),
    _classifier(
        "replknet_31b",
        "in22k_ft_in1k_384",
        384,
        (
            _mirror("replknet-31B_in21k-pre_3rdparty_in1k-384px_20221118-76c92b24.pth"),
            _drive("1Sc46BWdXXm2fVP-K_hKKU_W8vAB-0duX", "RepLKNet-31B_ImageNet-22K-to-1K_384.pth"),
        ),
        (_22K, _1K),
        _top1(86.0, 85.99),
    ),
    _classifier(
        "replknet_31b",
        "in22k",
        224,
        (_drive("1PYJiMszZYNrkZOeYwjccvxX8UHMALB7z", "RepLKNet-31B_ImageNet-22K.pth"),),
        (_22K,),
        num_classes=21841,
    ),
    _classifier(
        "replknet_31b",
        "in1k_120e",
        224,
        (_drive("1aQQiGfCoiBYSw2Ms506-ZFpnC9V6891s", "RepLKNet-31B_ImageNet-1K_120e.pth"),),  # name: ours
        (_1K,),
        (Score("top-1", 83.07, _1K, "paper, kernel-size study"),),
        note=_STUDY,
    ),
    _classifier(
        "replknet_13",
        "in1k_120e",
        224,
        (_drive("15gohkZof_Qi4__jluUXacB_0Gvbuf5GI", "RepLKNet-13_ImageNet-1K_120e.pth"),),  # name: ours
        (_1K,),
        (Score("top-1", 83.02, _1K, "paper, kernel-size study"),),
        note=_STUDY,
    ),
    _classifier(
        "replknet_31l",
        "in22k_ft_in1k_384",
        384,
        (
            _mirror("replknet-31L_in21k-pre_3rdparty_in1k-384px_20221118-dc3fc07c.pth"),
            _drive("1JYXoNHuRvC33QV1pmpzMTKEni1hpWfBl", "RepLKNet-31L_ImageNet-22K-to-1K_384.pth"),
        ),
        (_22K, _1K),
        _top1(86.6, 86.63),
    ),
    _classifier(
        "replknet_31l",
        "in22k",
        224,
        (_drive("16jcPsPwo5rko7ojWS9k_W-svHX-iFknY", "RepLKNet-31L_ImageNet-22K.pth"),),
        (_22K,),
        num_classes=21841,
        note="a third-party port finds the 22K predictions of this file wrong (release, #3); a start for fine-tuning",
    ),
    _classifier(
        "replknet_xl",
        "meg73m_ft_in1k_320",
        320,
        (
            _mirror("replknet-XL_meg73m-pre_3rdparty_in1k-320px_20221118-88259b1d.pth"),
            _drive("1tPC60El34GntXByIRHb-z-Apm4Y5LX1T", "RepLKNet-XL_MegData73M_ImageNet1K.pth"),
        ),
        (_73M, _1K),
        _top1(87.8, 87.57),
        note="mmpretrain normalises with 122.5 where the model was trained with 127.5; its score is the lower for it",
    ),
    _classifier(
        "replknet_xl",
        "meg73m",
        320,
        (_drive("1CBHAEUlCzoHfiAQmMIjZhDMAIyHUmAAj", "RepLKNet-XL_MegData73M_pretrain.pth"),),  # name: ours
        (_73M,),
        num_classes=21841,
        note="21841 outputs in the order of ImageNet-22K according to a third-party port; the release does not say",
    ),
)

_SEGMENTATION = (
    _dense(
        "replknet_31b",
        "in1k_upernet_cityscapes",
        "segmentation",
        _drive("1j3YwToRqTHHi7ocln0iBz1tE6hItD_JO", "RepLKNet-31B_ImageNet-1K_UperNet_Cityscapes.pth"),
        (769, 769),
        19,
        "UperNet",
        (_1K, _CITY),
        {"mIoU": 83.1, "mIoU multi-scale": 83.5},
        (110, 2315, (512, 2048)),
    ),
    _dense(
        "replknet_31b",
        "in1k_upernet_ade20k",
        "segmentation",
        _drive("1ZV1CP1KzeSdH6_wKw4ytVe9BlCGHf89s", "RepLKNet-31B_ImageNet-1K_UperNet_ADE20K.pth"),  # name: ours
        (512, 512),
        150,
        "UperNet",
        (_1K, _ADE),
        {"mIoU": 49.9, "mIoU multi-scale": 50.6},
        (112, 1170, (512, 2048)),
    ),
    _dense(
        "replknet_31b",
        "in22k_upernet_ade20k",
        "segmentation",
        _drive("1W2W4nD2HzTsG_yP9ppLYAqMo3T3JHBNW", "RepLKNet-31B_ImageNet-22K_UperNet_ADE20K.pth"),  # name: ours
        (640, 640),
        150,
        "UperNet",
        (_22K, _ADE),
        {"mIoU": 51.5, "mIoU multi-scale": 52.3},
        (112, 1829, (640, 2560)),
    ),
    _dense(
        "replknet_31l",
        "in22k_upernet_ade20k",
        "segmentation",
        _drive("1nrZ723LC3QYjcVHJm8jpOOcecfWMsjxL", "RepLKNet-31L_ImageNet-22K_UperNet_ADE20K.pth"),  # name: ours
        (640, 640),
        150,
        "UperNet",
        (_22K, _ADE),
        {"mIoU": 52.4, "mIoU multi-scale": 52.7},
        (207, 2404, (640, 2560)),
    ),
    _dense(
        "replknet_xl",
        "meg73m_upernet_ade20k",
        "segmentation",
        _drive("14GbBI8tdeEl_ECytDCdrfAfNm1McqMv4", "RepLKNet-XL_MegData73M_UperNet_ADE20K.pth"),  # name: ours
        (640, 640),
        150,
        "UperNet",
        (_73M, _ADE),
        {"mIoU": 55.2, "mIoU multi-scale": 56.0},
        (374, 3431, (640, 2560)),
    ),
)

_DETECTION = (
    _dense(
        "replknet_31b",
        "in1k_fcos_coco",
        "detection",
        _drive("1g0jSpONBF2wJDXYhB7P3mbqAVE587Myi", "RepLKNet-31B_ImageNet-1K_FCOS_COCO.pth"),  # name: ours
        (800, 1333),
        80,
        "FCOS",
        (_1K, _COCO),
        {"AP box": 47.0},
        (87, 437, (800, 1280)),
    ),
    _dense(
        "replknet_31b",
        "in1k_cascade_mask_rcnn_coco",
        "detection",
        _drive("1XqWSkQZSLMIhyaQvaIhGbuFhdDoRJQ4Z", "RepLKNet-31B_ImageNet-1K_CascMaskRCNN_COCO.pth"),  # name: ours
        (800, 1333),
        80,
        "Cascade Mask R-CNN",
        (_1K, _COCO),
        {"AP box": 52.2, "AP mask": 45.2},
        (137, 965, (800, 1280)),
    ),
    _dense(
        "replknet_31b",
        "in22k_cascade_mask_rcnn_coco",
        "detection",
        _drive("1faI-MiNuPidum6dC6dGADfYWe6J-bTAz", "RepLKNet-31B_ImageNet-22K_CascMaskRCNN_COCO.pth"),
        (800, 1333),
        80,
        "Cascade Mask R-CNN",
        (_22K, _COCO),
        {"AP box": 53.0, "AP mask": 46.0},
        (137, 965, (800, 1280)),
    ),
    _dense(
        "replknet_31l",
        "in22k_cascade_mask_rcnn_coco",
        "detection",
        _drive("1qLQONhIjCEuykhdy-wHx1Ah9lT3v2OXh", "RepLKNet-31L_ImageNet-22K_CascMaskRCNN_COCO.pth"),  # name: ours
        (800, 1333),
        80,
        "Cascade Mask R-CNN",
        (_22K, _COCO),
        {"AP box": 53.9, "AP mask": 46.5},
        (229, 1321, (800, 1280)),
    ),
    _dense(
        "replknet_xl",
        "meg73m_cascade_mask_rcnn_coco",
        "detection",
        _drive("1i0TqfwQJQUVHWdB5oyDgxlUUqzPZmIVr", "RepLKNet-XL_MegData73M_CascMaskRCNN_COCO.pth"),  # name: ours
        (800, 1333),
        80,
        "Cascade Mask R-CNN",
        (_73M, _COCO),
        {"AP box": 55.5, "AP mask": 48.0},
        (392, 1958, (800, 1280)),
    ),
)

WEIGHTS: dict[str, Weights] = {entry.name: entry for entry in (*_CLASSIFICATION, *_SEGMENTATION, *_DETECTION)}
"""All official weights by name, the default of a model first."""


def find_weights(name: str) -> Weights:
    """The entry called `MODEL.TAG`; a bare `MODEL` means its default classification weights.

    Raises:
        UsageError: no such weights; near names are given.
    """
    if name in WEIGHTS:
        return WEIGHTS[name]
    for entry in weights_of(name):
        return entry
    near = difflib.get_close_matches(name, WEIGHTS, n=3, cutoff=0.5)
    raise UsageError(
        f"no official weights are called {name!r}; "
        + (f"near names: {', '.join(near)}" if near else f"known: {', '.join(WEIGHTS)}")
    )


def weights_of(model: str, task: Task = "classification") -> Iterator[Weights]:
    """Official weights of one architecture, its default first."""
    return (entry for entry in WEIGHTS.values() if entry.model == model and entry.task == task)


def timm_default_cfgs() -> dict[str, dict[str, Any]]:
    """Arguments of `timm.models.PretrainedCfg` for every classification entry, keyed `MODEL.TAG`."""
    return {entry.name: _timm_cfg(entry) for entry in WEIGHTS.values() if entry.task == "classification"}


def _timm_cfg(entry: Weights) -> dict[str, Any]:
    return {
        # timm takes a configuration for a pretrained one by its URL; the file itself comes from models/download.py.
        "url": entry.sources[0].url,
        "input_size": entry.input_size,
        "pool_size": (entry.input_size[1] // 32, entry.input_size[2] // 32),
        "interpolation": "bicubic",
        "crop_pct": entry.crop_pct,
        "crop_mode": entry.crop_mode,
        "mean": entry.mean,
        "std": entry.std,
        "num_classes": entry.num_classes,
        "first_conv": "stem.0.conv",
        "classifier": "head",
        "license": LICENSE,
        "origin_url": RELEASE,
        "paper_ids": PAPER,
    }
