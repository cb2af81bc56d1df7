"""RepLKNet: convolutional networks with kernels as large as 31x31, as timm models.

Paper: Ding, Zhang, Han, Ding 2022, "Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs",
arXiv:2203.06717. Official release: github.com/DingXiaoH/RepLKNet-pytorch (MIT), whose state dicts load unchanged.
The code here is our own.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, Literal

import torch
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from replknet.layers import ConvFFN, ConvNorm, RepLKBlock, conv_norm, reparameterize
from replknet.layers.activation_checkpoint import checkpointed
from replknet.layers.algebra import fold_before, norm_affine, replaced, to_float64, why_norm_cannot_fold
from replknet.layers.conv_norm import NormLayer, refuse_training
from replknet.models._layer_groups import layer_group

Form = Literal["train", "merged", "fused"]
FORMS: tuple[Form, ...] = ("train", "merged", "fused")


class Stem(nn.Sequential):
    """Four units: 3x3 dense, 3x3 depthwise, 1x1, 3x3 depthwise; stride 4 in the release."""

    grad_checkpointing = False

    def __init__(self, in_chans: int, channels: int, stride: int, norm_layer: NormLayer):
        first, last = {1: (1, 1), 2: (2, 1), 4: (2, 2)}[stride]
        depthwise: dict[str, Any] = {"groups": channels, "norm_layer": norm_layer}
        super().__init__(
            conv_norm(in_chans, channels, 3, stride=first, norm_layer=norm_layer, act=nn.ReLU()),
            conv_norm(channels, channels, 3, act=nn.ReLU(), **depthwise),
            conv_norm(channels, channels, 1, norm_layer=norm_layer, act=nn.ReLU()),
            conv_norm(channels, channels, 3, stride=last, act=nn.ReLU(), **depthwise),
        )

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Sequential's own name
        """`[N, in_chans, H, W]` to `[N, C, H / stride, W / stride]`."""
        x = self[0](input)
        for unit in list(self)[1:]:
            x = checkpointed(unit, x) if self.grad_checkpointing else unit(x)
        return x


class Stage(nn.Module):
    """Pairs of RepLKBlock and ConvFFN; `norm` serves feature maps that are handed out and is not part of `forward`."""

    grad_checkpointing = False

    def __init__(self, blocks: Sequence[nn.Module], norm: nn.Module):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` to the same."""
        for block in self.blocks:
            x = checkpointed(block, x) if self.grad_checkpointing else block(x)
        return x


class RepLKNet(nn.Module):
    """The RepLKNet family.

    Args:
        kernel_sizes: of the depthwise convolutions, one odd number a stage. Any size; beyond what the depthwise
            operator covers, torch's own convolution runs.
        layers: layers a stage; a layer is one RepLKBlock and one ConvFFN.
        channels: channels a stage.
        small_kernel: odd extent of the small kernel beside every large one in training; None for none.
        dw_ratio: width of the depthwise convolutions relative to the stage's channels.
        ffn_ratio: width of the ConvFFNs relative to the stage's channels.
        in_chans: channels of the images.
        num_classes: outputs of the head; 0 for none, `forward` then returns pooled normalised features.
        global_pool: timm's name of the pooling in front of the head, "avg" in the release; "" for none.
        drop_rate: dropout in front of the head.
        drop_path_rate: of the last layer; rises linearly from 0 over the layers, both blocks of a layer share it.
        norm_features: stages whose feature maps are batch-normalised when handed out, as the release does with XL in
            detection and segmentation: True for all stages, or their indices. Needs `num_classes=0` (which
            `features_only=True` implies): a classifier would leave these norms without gradient.
        grad_checkpointing: recompute activations in backward instead of storing them.
        stem_stride: 4; 2 or 1 for small images.
        norm_layer: makes every norm: `nn.BatchNorm2d`, `nn.SyncBatchNorm`, any class or function of a channel count,
            or one of the names in `NORM_LAYERS`.
        form: "train", "merged" (the release's deploy form: one kernel with a bias per block) or "fused" (all norms
            folded too), as `replknet.reparameterize` makes them.
        device: where parameters are made.
        dtype: of the parameters.

    Images `[N, in_chans, H, W]` of any size, square or not, in a floating dtype; logits `[N, num_classes]`.

    Raises:
        ValueError: an even kernel, lists of different lengths, a small kernel larger than a large one, an unknown
            form, stem stride or norm name.
    """

    def __init__(
        self,
        kernel_sizes: Sequence[int] = (31, 29, 27, 13),
        layers: Sequence[int] = (2, 2, 18, 2),
        channels: Sequence[int] = (128, 256, 512, 1024),
        small_kernel: int | None = 5,
        dw_ratio: float = 1.0,
        ffn_ratio: float = 4.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_features: bool | Sequence[int] = False,
        grad_checkpointing: bool = False,
        stem_stride: int = 4,
        norm_layer: NormLayer | str = nn.BatchNorm2d,
        form: Form = "train",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        _check(kernel_sizes, layers, channels, stem_stride, form)
        self.layers = tuple(layers)
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.num_features = self.head_hidden_size = channels[-1]
        self.feature_info = [
            {"num_chs": c, "reduction": stem_stride * 2**s, "module": f"stages.{s}"} for s, c in enumerate(channels)
        ]
        self.norm_in_head = False
        make_norm = _norm_layer(norm_layer)
        with torch.device(device) if device is not None else nullcontext():
            self.stem = Stem(in_chans, channels[0], stem_stride, make_norm)
            self.stages = nn.Sequential(*self._make_stages(make_norm))
            self.transitions = nn.Sequential(*(_transition(a, b, make_norm) for a, b in pairwise(channels)))
            self.norm = make_norm(channels[-1])
            self.global_pool, self.head = _classifier(channels[-1], num_classes, global_pool)
        self.set_grad_checkpointing(grad_checkpointing)
        if dtype is not None:
            self.to(dtype)
        self._take_form(form)

    def _make_stages(self, norm_layer: NormLayer) -> list[Stage]:
        c = self.config
        rates = torch.linspace(0, c["drop_path_rate"], sum(self.layers), device="cpu").split(self.layers)
        normed = _normed_stages(c["norm_features"], len(self.layers), self.num_classes)
        stages = []
        for s, (width, kernel) in enumerate(zip(c["channels"], c["kernel_sizes"], strict=True)):
            blocks = []
            for rate in rates[s].tolist():
                shared: dict[str, Any] = {"drop_path": rate, "norm_layer": norm_layer}
                dw = int(width * c["dw_ratio"])
                blocks.append(RepLKBlock(width, kernel, c["small_kernel"], dw_channels=dw, **shared))
                blocks.append(ConvFFN(width, int(width * c["ffn_ratio"]), **shared))
            stages.append(Stage(blocks, norm_layer(width) if s in normed else nn.Identity()))
        return stages

    def _take_form(self, form: Form) -> None:
        if form != "train":
            reparameterize(self.eval(), fold_norms=form == "fused").train()

    @property
    def form(self) -> Form:
        """Which of the three forms the network is in."""
        units = [m for m in self.modules() if isinstance(m, ConvNorm)]
        if all(isinstance(unit.bn, nn.Identity) for unit in units):
            return "fused"
        kernels = [b.large_kernel for b in self.modules() if isinstance(b, RepLKBlock)]
        return "merged" if all(kernel.is_merged for kernel in kernels) else "train"

    def forward_features(self, x: Tensor) -> Tensor:
        """Last feature map `[N, C, H / 32, W / 32]`, before the final norm as in the release."""
        x = self.stem(x)
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index < len(self.transitions):
                x = self.transitions[index](x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Norm, pooling, dropout and, unless `pre_logits`, the linear layer.

        Raises:
            NotImplementedError: `pre_logits` of a fused classifier, whose norm is part of the linear layer.
        """
        if pre_logits and self.norm_in_head:
            raise NotImplementedError(
                "the final norm of this fused classifier is part of its linear layer, so there are no normalised "
                "features before it; build the model with num_classes=0, or take the features before reparameterize()"
            )
        x = self.global_pool(self.norm(x))
        x = nn.functional.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, in_chans, H, W]` to logits `[N, num_classes]`."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of stages, highest resolution first.

        Args:
            x: `[N, in_chans, H, W]`.
            indices: of stages, from the end if negative; an integer means so many last ones; None all.
            norm: apply the final norm to the last stage's map.
            stop_early: do not run what no wanted map needs.
            output_fmt: "NCHW" only.
            intermediates_only: return the list alone.

        Returns:
            The list of maps `[N, C, H, W]`, or `forward_features(x)` (up to where it ran) and the list.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"RepLKNet's feature maps come as NCHW only; got output_fmt={output_fmt!r}")
        taken = _taken(len(self.stages), indices)
        last = max(taken) if stop_early or intermediates_only else len(self.stages) - 1
        maps = []
        x = self.stem(x)
        for index, stage in enumerate(self.stages[: last + 1]):
            x = self.transitions[index - 1](x) if index else x
            x = stage(x)
            if index in taken:
                own: nn.Module = stage.norm  # type: ignore[assignment]
                final = norm and index == len(self.feature_info) - 1 and isinstance(own, nn.Identity)
                maps.append(self.norm(x) if final else own(x))
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the wanted feature maps do not need; returns their indices, ascending."""
        taken = _taken(len(self.stages), indices)
        last = max(taken)
        cut = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        self.transitions = self.transitions[:last]
        for index, stage in enumerate(self.stages):
            if index not in taken:
                stage.norm = nn.Identity()
        if prune_norm or cut:
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or cut:
            self.num_classes = 0
            self.global_pool, self.head = _classifier(self.num_features, 0, "")
        return taken

    def get_classifier(self) -> nn.Module:
        """The linear layer, `nn.Identity` where there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head, keeping device and dtype.

        Raises:
            NotImplementedError: a fused classifier, whose final norm is part of the old linear layer.
        """
        if self.norm_in_head:
            raise NotImplementedError("the head of a fused classifier holds its final norm: replace it before fusing")
        some = next(self.parameters())
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.num_classes = num_classes
        self.config.update(num_classes=num_classes, global_pool=pool)
        self.global_pool, self.head = _classifier(self.num_features, num_classes, pool)  # type: ignore[arg-type]
        self.head.to(some.device, some.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of stem and blocks in backward instead of storing them."""
        for module in (self.stem, *self.stages):
            module.grad_checkpointing = enable  # type: ignore[assignment]

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Parameter name to layer-decay group: the release's 14 groups for layers 2-2-18-2; `coarse`: one a stage."""
        return lambda name: layer_group(name, self.layers, coarse=coarse)

    def no_weight_decay(self) -> set[str]:
        """Names that are never decayed, beyond biases and norms: none."""
        return set()

    @torch.no_grad()
    def fuse(self) -> "RepLKNet":
        """`replknet.reparameterize` of this network: in place, idempotent, evaluation only."""
        refuse_training(self)
        for part in (self.stem, self.stages, self.transitions):
            for module in part.modules():
                if isinstance(module, (ConvNorm, RepLKBlock, ConvFFN)):
                    module.fuse()
        self._fold_norm_into_head()
        return self

    def _fold_norm_into_head(self) -> None:
        """Average pooling keeps an affine map per channel as it is, so the final norm can move into the head."""
        averages = getattr(self.global_pool, "pool_type", "") in ("avg", "fast", "fastavg")
        if not isinstance(self.head, nn.Linear) or isinstance(self.norm, nn.Identity) or not averages:
            return
        if why_norm_cannot_fold(self.norm):
            return
        bias = to_float64(self.head.bias)
        weight, bias = fold_before(to_float64(self.head.weight), bias, *norm_affine(self.norm))
        self.head.weight, self.head.bias = replaced(self.head.weight, weight), replaced(self.head.bias, bias)
        self.norm = nn.Identity().eval()
        self.norm_in_head = True


NORM_LAYERS: dict[str, NormLayer] = {"batchnorm2d": nn.BatchNorm2d, "syncbatchnorm": nn.SyncBatchNorm}
"""Norms that can be named by a string, in a YAML file for example."""


def _norm_layer(norm: NormLayer | str) -> NormLayer:
    if not isinstance(norm, str):
        return norm
    if norm not in NORM_LAYERS:
        raise ValueError(f"unknown norm_layer {norm!r}; accepted: {', '.join(NORM_LAYERS)}, or a class")
    return NORM_LAYERS[norm]


def _transition(in_channels: int, out_channels: int, norm_layer: NormLayer) -> nn.Sequential:
    return nn.Sequential(
        conv_norm(in_channels, out_channels, 1, norm_layer=norm_layer, act=nn.ReLU()),
        conv_norm(out_channels, out_channels, 3, stride=2, groups=out_channels, norm_layer=norm_layer, act=nn.ReLU()),
    )


def _classifier(channels: int, num_classes: int, pool: str) -> tuple[SelectAdaptivePool2d, nn.Module]:
    if num_classes > 0 and not pool:
        raise ValueError(f"a head with {num_classes} classes needs a pooling; got global_pool={pool!r}")
    pooling = SelectAdaptivePool2d(pool_type=pool, flatten=bool(pool))
    width = channels * pooling.feat_mult()
    return pooling, nn.Linear(width, num_classes) if num_classes > 0 else nn.Identity()


def _normed_stages(norm_features: bool | Sequence[int], stages: int, num_classes: int) -> set[int]:
    wanted = range(stages) if norm_features is True else norm_features or ()
    normed = {s + stages if s < 0 else s for s in wanted}
    if not normed <= set(range(stages)):
        raise ValueError(f"norm_features={norm_features} names stages that do not exist; there are {stages}")
    if normed and num_classes > 0:
        raise ValueError(
            "norm_features serves feature extraction: in a classifier these norms would get no gradient; "
            "use features_only=True or num_classes=0"
        )
    return normed


def _taken(stages: int, indices: int | Sequence[int] | None) -> list[int]:
    if indices is not None and not isinstance(indices, int) and len(indices) == 0:
        raise ValueError("no feature map was asked for: out_indices is empty")
    limit = range(-stages, stages)
    if isinstance(indices, int) and not 0 < indices <= stages:
        raise ValueError(f"the last {indices} feature maps were asked for; there are {stages}")
    if not isinstance(indices, int) and any(i not in limit for i in indices or ()):
        raise ValueError(f"feature indices {list(indices or ())} are out of range; there are {stages} stages")
    return sorted(set(feature_take_indices(stages, indices)[0]))  # type: ignore[arg-type]


def _check(
    kernel_sizes: Sequence[int], layers: Sequence[int], channels: Sequence[int], stem_stride: int, form: str
) -> None:
    if not len(kernel_sizes) == len(layers) == len(channels) >= 1:
        raise ValueError(
            f"kernel_sizes, layers and channels need one entry a stage each; got {list(kernel_sizes)}, {list(layers)} "
            f"and {list(channels)}"
        )
    if any(k < 1 or k % 2 == 0 for k in kernel_sizes):
        raise ValueError(f"kernel sizes must be odd and positive to have a centre; got {list(kernel_sizes)}")
    if min(layers) < 1 or min(channels) < 1:
        raise ValueError(f"layers and channels must be positive; got {list(layers)} and {list(channels)}")
    if stem_stride not in (1, 2, 4):
        raise ValueError(f"stem_stride must be 1, 2 or 4; got {stem_stride}")
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; accepted: {', '.join(FORMS)}")
