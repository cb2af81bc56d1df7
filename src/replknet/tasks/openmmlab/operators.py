"""The operators that FCOS and Cascade Mask R-CNN need, from torchvision, in the place of mmcv's compiled ones.

The wheels of onedl-mmcv carry no compiled operators, and building them takes a compiler and half an hour. mmcv takes
its operators from the module `mmcv._ext`; `place_operators` puts one there that is made of torchvision's.

| mmcv's | here |
|---|---|
| `nms`, and `batched_nms` which calls it | `torchvision.ops.nms` |
| `soft_nms` | torch, one box at a time |
| `RoIAlign` with average pooling | torchvision's, forward and backward |
| `sigmoid_focal_loss` | `torchvision.ops.sigmoid_focal_loss`, its gradient from autograd |
| every other | an error that names it and says what it needs |

Where mmcv was built with operators, those stay.
"""

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from replknet._errors import UsageError

_log = logging.getLogger(__name__)

NAME = "mmcv._ext"


def place_operators() -> Literal["compiled", "torchvision"]:
    """Make sure that `mmcv.ops` can be imported; call it before anything imports `mmcv.ops` or `mmdet`.

    Returns:
        "compiled" where mmcv has operators of its own, which are then used; else "torchvision".

    Raises:
        UsageError: mmdet was imported before, and has settled for doing without operators.
    """
    loaded = sys.modules.get(NAME)
    if loaded is not None:
        return "torchvision" if isinstance(loaded, _Operators) else "compiled"
    if importlib.util.find_spec(NAME) is not None:
        try:
            importlib.import_module(NAME)
        except (ImportError, OSError) as error:
            reason = str(error).splitlines()[0]
            _log.warning("mmcv's compiled operators cannot be loaded (%s); torchvision's take their place", reason)
        else:
            return "compiled"
    if early := next((name for name in sys.modules if name.startswith("mmdet.") and _uses_operators(name)), None):
        raise UsageError(
            f"{early} was imported before its operators were in place: import replknet.tasks.detection first"
        )
    module = _Operators(NAME, __doc__)
    module.__spec__ = ModuleSpec(NAME, None)
    sys.modules[NAME] = module
    setattr(importlib.import_module("mmcv"), "_ext", module)  # noqa: B010 - no attribute that mmcv declares
    return "torchvision"


def _uses_operators(name: str) -> bool:
    """Whether a module of mmdet has looked for mmcv's operators and found none."""
    return any(getattr(sys.modules[name], function, None) is not None for function in ("roi_align", "batched_nms"))


class _Operators(ModuleType):
    """Stands for the compiled module; knows the operators of `_AVAILABLE` and explains the lack of others."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AVAILABLE.get(name) or _unavailable(name)


def _unavailable(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            f"mmcv's operator {name!r} is not among those that torchvision provides here "
            f"({', '.join(sorted(_AVAILABLE))}); to use it, build onedl-mmcv with its operators: "
            "MMCV_WITH_OPS=1 pip install --no-binary onedl-mmcv --no-build-isolation onedl-mmcv"
        )

    return refuse


def _computable(x: Tensor) -> Tensor:
    """torchvision has no bfloat16 kernels, and half ones on GPUs only."""
    in_half = x.dtype is torch.bfloat16 or (x.dtype is torch.float16 and x.device.type == "cpu")
    return x.float() if in_half else x


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes that stay, best first.

    Args:
        boxes: `[N, 4]`, corners x1 y1 x2 y2.
        scores: `[N]`.
        iou_threshold: a box goes if its IoU with a better one is above.
        offset: 1 for corners that name the last pixel, 0 for edges.
    """
    boxes = _computable(boxes)
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torchvision.ops.nms(boxes, _computable(scores).to(boxes.dtype), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS: overlapping boxes lose score instead of going. Bodla et al. 2017, arXiv:1704.04503.

    Args:
        boxes: `[N, 4]`.
        scores: `[N]`.
        dets: `[N, 5]`, receives boxes and new scores in its first rows.
        iou_threshold: for methods 0 and 1.
        sigma: of the Gaussian, method 2.
        min_score: boxes whose score falls below go.
        method: 0 hard, 1 linear, 2 Gaussian.
        offset: as for `nms`.

    Returns:
        Indices of the boxes that stay, in the order in which they were taken.
    """
    far = boxes + boxes.new_tensor([0, 0, offset, offset])
    score, left = scores.clone(), torch.ones_like(scores, dtype=torch.bool)
    kept: list[int] = []
    while left.any():
        best = int(score.masked_fill(~left, -torch.inf).argmax())
        dets[len(kept)] = torch.cat([boxes[best], score[best : best + 1]])
        kept.append(best)
        left[best] = False
        iou = torchvision.ops.box_iou(far[best : best + 1], far)[0]
        above = iou >= iou_threshold
        kept_share = (1.0 - above.to(score), torch.where(above, 1 - iou, 1.0), torch.exp(-(iou**2) / sigma))[method]
        score = torch.where(left, score * kept_share, score)
        left &= score >= min_score
    return torch.tensor(kept, dtype=torch.long)


def roi_align_forward(
    input: Tensor,  # noqa: A002 - mmcv's name
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    **options: Any,
) -> None:
    """RoIAlign by average: fills `output` `[K, C, h, w]` from `input` `[N, C, H, W]` and `rois` `[K, 5]`.

    Options as in `_roi_options`. `argmax_y` and `argmax_x` belong to pooling by maximum.

    Raises:
        NotImplementedError: pooling by maximum.
    """
    scale, height, width, ratio, aligned = _roi_options(options)
    x = _computable(input)
    output.copy_(torch.ops.torchvision.roi_align(x, rois.to(x.dtype), scale, height, width, ratio, aligned))


def roi_align_backward(
    grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor, **options: Any
) -> None:
    """The gradient of `roi_align_forward`: fills `grad_input` `[N, C, H, W]` from `grad_output` `[K, C, h, w]`."""
    scale, height, width, ratio, aligned = _roi_options(options)
    grad = _computable(grad_output)
    # torchvision's own backward operator; its autograd formula is this call.
    found = torch.ops.torchvision._roi_align_backward(
        grad, rois.to(grad.dtype), scale, height, width, *grad_input.shape, ratio, aligned
    )
    grad_input.copy_(found)


def _roi_options(options: dict[str, Any]) -> tuple[float, int, int, int, bool]:
    if options["pool_mode"] != 1:
        raise NotImplementedError("torchvision's RoIAlign pools by average only; use pool_mode='avg'")
    return (
        options["spatial_scale"],
        options["aligned_height"],
        options["aligned_width"],
        options["sampling_ratio"],
        options["aligned"],
    )


def sigmoid_focal_loss_forward(
    input: Tensor,  # noqa: A002 - mmcv's name
    target: Tensor,
    weight: Tensor,
    output: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Focal loss of every logit: fills `output` `[N, C]`.

    Args:
        input: logits `[N, C]`.
        target: classes `[N]`, C for background.
        weight: empty.
        output: `[N, C]`.
        gamma, alpha: Lin et al. 2017, arXiv:1708.02002.

    Raises:
        NotImplementedError: class weights.
    """
    output.copy_(_focal_loss(input, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor,  # noqa: A002 - mmcv's name
    target: Tensor,
    weight: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """The gradient of the sum of `sigmoid_focal_loss_forward`: fills `grad_input` `[N, C]`."""
    with torch.enable_grad():
        logits = input.detach().requires_grad_()
        loss = _focal_loss(logits, target, weight, gamma, alpha).sum()
    grad_input.copy_(torch.autograd.grad(loss, logits)[0])


def _focal_loss(logits: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    if weight.numel():
        raise NotImplementedError("sigmoid_focal_loss takes no class weights here; weight the loss of each element")
    # float32 at least: the product of small probabilities underflows in 16 bits.
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    classes = logits.shape[1]
    one_hot = F.one_hot(target, classes + 1)[:, :classes].to(logits.dtype)
    return torchvision.ops.sigmoid_focal_loss(logits, one_hot, alpha=alpha, gamma=gamma, reduction="none")


def get_compiler_version() -> str:
    """What mmcv's reports of the environment print."""
    return "none: operators from torchvision"


def get_compiling_cuda_version() -> str:
    """What mmcv's reports of the environment print."""
    return "none: operators from torchvision"


_AVAILABLE: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        nms,
        softnms,
        roi_align_forward,
        roi_align_backward,
        sigmoid_focal_loss_forward,
        sigmoid_focal_loss_backward,
        get_compiler_version,
        get_compiling_cuda_version,
    )
}
