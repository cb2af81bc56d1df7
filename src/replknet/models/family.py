"""The named members of the RepLKNet family, registered with timm."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._builder import resolve_pretrained_cfg
from torch import nn

from replknet.models._features import FeatureDict, FeatureGetter, FeatureList
from replknet.models.checkpoints import checkpoint_filter_fn
from replknet.models.download import local_pretrained_cfg
from replknet.models.replknet import RepLKNet
from replknet.models.weights import timm_default_cfgs

_FEATURE_CLASSES = {"list": FeatureList, "dict": FeatureDict, "getter": FeatureGetter}

_STUDY: dict[str, Any] = {"layers": (2, 2, 18, 2), "channels": (128, 256, 512, 1024)}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "replknet_31b": {**_STUDY, "kernel_sizes": (31, 29, 27, 13), "small_kernel": 5},
    "replknet_31l": {
        "layers": (2, 2, 18, 2),
        "channels": (192, 384, 768, 1536),
        "kernel_sizes": (31, 29, 27, 13),
        "small_kernel": 5,
    },
    "replknet_xl": {
        "layers": (2, 2, 18, 2),
        "channels": (256, 512, 1024, 2048),
        "kernel_sizes": (27, 27, 27, 13),
        "small_kernel": None,
        "dw_ratio": 1.5,
    },
    "replknet_3": {**_STUDY, "kernel_sizes": (3, 3, 3, 3), "small_kernel": None},
    "replknet_7": {**_STUDY, "kernel_sizes": (7, 7, 7, 7), "small_kernel": 5},
    "replknet_13": {**_STUDY, "kernel_sizes": (13, 13, 13, 13), "small_kernel": 5},
    "replknet_25": {**_STUDY, "kernel_sizes": (25, 25, 25, 13), "small_kernel": 5},
    "replknet_nano": {
        "layers": (1, 1, 2, 1),
        "channels": (24, 48, 96, 192),
        "kernel_sizes": (13, 13, 9, 5),
        "small_kernel": 3,
        "stem_stride": 2,
    },
    "replknet_tiny": {
        "layers": (2, 2, 6, 2),
        "channels": (48, 96, 192, 384),
        "kernel_sizes": (31, 29, 27, 13),
        "small_kernel": 5,
    },
    "replknet_small": {
        "layers": (2, 2, 12, 2),
        "channels": (72, 144, 288, 576),
        "kernel_sizes": (31, 29, 27, 13),
        "small_kernel": 5,
    },
}
"""Constructor arguments of every named model."""


def _untrained(size: int, reduction: int = 32) -> dict[str, Any]:
    return {
        "input_size": (3, size, size),
        "pool_size": (size // reduction, size // reduction),
        "interpolation": "bicubic",
        "first_conv": "stem.0.conv",
        "classifier": "head",
        "license": "mit",
        "paper_ids": "arXiv:2203.06717",
    }


default_cfgs = generate_default_cfgs(
    {
        **timm_default_cfgs(),
        "replknet_3.untrained": _untrained(224),
        "replknet_7.untrained": _untrained(224),
        "replknet_25.untrained": _untrained(224),
        "replknet_nano.untrained": _untrained(32, 16),
        "replknet_tiny.untrained": _untrained(224),
        "replknet_small.untrained": _untrained(224),
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    args = {**ARCHITECTURES[variant], **kwargs}
    if args.get("features_only"):
        args.setdefault("num_classes", 0)
        wanted = args.get("feature_cls", "list")
        args["feature_cls"] = _FEATURE_CLASSES.get(wanted, wanted) if isinstance(wanted, str) else wanted
    if pretrained:
        given, overlay = args.get("pretrained_cfg"), args.get("pretrained_cfg_overlay") or {}
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg=given, pretrained_cfg_overlay=overlay)
        args["pretrained_cfg_overlay"] = {**overlay, **local_pretrained_cfg(variant, cfg)}
    return build_model_with_cfg(
        RepLKNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(len(args["channels"])))},
        **args,
    )


@register_model
def replknet_31b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepLKNet-31B: kernels 31-29-27-13, channels 128-256-512-1024."""
    return _create("replknet_31b", pretrained, kwargs)


@register_model
def replknet_31l(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepLKNet-31L: kernels 31-29-27-13, channels 192-384-768-1536."""
    return _create("replknet_31l", pretrained, kwargs)


@register_model
def replknet_xl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepLKNet-XL: kernels 27-27-27-13, channels 256-512-1024-2048, depthwise 1.5 times as wide, no small kernel."""
    return _create("replknet_xl", pretrained, kwargs)


@register_model
def replknet_3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Kernel-size study: 3x3 everywhere; without a small kernel, as a 5x5 beside it would make it a 5x5."""
    return _create("replknet_3", pretrained, kwargs)


@register_model
def replknet_7(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Kernel-size study: 7x7 everywhere."""
    return _create("replknet_7", pretrained, kwargs)


@register_model
def replknet_13(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Kernel-size and ERF study: 13x13 everywhere."""
    return _create("replknet_13", pretrained, kwargs)


@register_model
def replknet_25(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Kernel-size study: 25-25-25-13."""
    return _create("replknet_25", pretrained, kwargs)


@register_model
def replknet_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Ours, not the paper's, for images of 32 pixels or so: kernels 13-13-9-5, channels 24-48-96-192, stem stride 2.

    0.85 M parameters, 10.7 M multiply-adds at 32x32 (merged form).
    """
    return _create("replknet_nano", pretrained, kwargs)


@register_model
def replknet_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Ours, not the paper's, for small machines: kernels 31-29-27-13, channels 48-96-192-384, layers 2-2-6-2.

    7.2 M parameters, 1.55 G multiply-adds at 224x224 (merged form).
    """
    return _create("replknet_tiny", pretrained, kwargs)


@register_model
def replknet_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Ours, not the paper's, between tiny and 31B: kernels 31-29-27-13, channels 72-144-288-576, layers 2-2-12-2.

    21.1 M parameters, 4.25 G multiply-adds at 224x224 (merged form).
    """
    return _create("replknet_small", pretrained, kwargs)
