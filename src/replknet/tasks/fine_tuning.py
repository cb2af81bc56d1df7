"""The model that a training starts from: fresh, or with weights of another class count, resolution or channel count."""

import logging
from collections.abc import Sequence
from typing import Any

from timm.models import adapt_input_conv
from torch import Tensor, nn

from replknet._errors import RunError, UsageError
from replknet.models.checkpoints import load_checkpoint, read_state_dict
from replknet.models.factory import create_model

_logger = logging.getLogger(__name__)


def build_model(
    name: str,
    *,
    num_classes: int,
    in_chans: int,
    weights: str | None = None,
    pretrained: bool = False,
    use_ema: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """A model for `num_classes` and `in_chans`, with weights if any are named.

    The head is new if, and only if, the weights are for another number of classes; weights for another number of
    input channels are adapted in the first convolution as timm does it. Both are said in a warning. Resolution needs
    no change: the networks are convolutional.

    Args:
        name: any timm model.
        num_classes, in_chans: of the data.
        weights: a checkpoint file.
        pretrained: the registered weights instead; timm adapts head and first convolution by the same rules.
        use_ema: of `weights`, take the averaged ones where it has both.
        kwargs: constructor arguments.

    Raises:
        UsageError: unknown model, missing file, `weights` together with `pretrained`.
        RunError: weights of another architecture, or a damaged file.
    """
    if weights is not None and pretrained:
        raise UsageError("give either weights or pretrained, not both")
    model = create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **kwargs)
    if weights is None:
        cfg = getattr(model, "pretrained_cfg", None) or {}
        if pretrained and cfg.get("num_classes", num_classes) != num_classes:
            _say_new_head(f"{name}'s weights", cfg["num_classes"], num_classes)
        return model
    state = read_state_dict(weights, use_ema=use_ema)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    _adapt_first_convolution(state, cfg.get("first_conv"), in_chans, weights)
    differs = _head_that_differs(state, cfg.get("classifier"), num_classes, weights)
    try:
        load_checkpoint(model, state, may_differ=differs)
    except RunError as error:
        raise RunError(f"{weights}: {error}") from error
    return model


def _adapt_first_convolution(state: dict[str, Tensor], name: Any, in_chans: int, weights: str) -> None:
    weight = state.get(f"{name}.weight") if isinstance(name, str) else None
    if weight is None or weight.shape[1] == in_chans:
        return
    if weight.shape[1] != 3:
        raise RunError(
            f"{weights} is for {weight.shape[1]} input channels and the data have {in_chans}; "
            "weights can be adapted from 3 channels only"
        )
    state[f"{name}.weight"] = adapt_input_conv(in_chans, weight)
    _logger.warning("%s is for 3 input channels: its first convolution was adapted to %d", weights, in_chans)


def _head_that_differs(state: dict[str, Tensor], head: Any, num_classes: int, weights: str) -> tuple[str, ...]:
    weight = state.get(f"{head}.weight") if isinstance(head, str) else None
    if weight is None or weight.shape[0] == num_classes:
        return ()
    _say_new_head(weights, weight.shape[0], num_classes)
    return (head,)


def _say_new_head(weights: str, classes: int, num_classes: int) -> None:
    _logger.warning("%s: for %d classes where the data have %d; the head starts anew", weights, classes, num_classes)


def frozen_modules(model: nn.Module, prefixes: Sequence[str]) -> tuple[nn.Module, ...]:
    """Stop the gradients of the modules with these names, and return them; their batch norms keep their statistics.

    Raises:
        UsageError: no module has such a name; the message lists those at the top.
    """
    modules = dict(model.named_modules())
    for prefix in prefixes:
        if prefix not in modules or prefix == "":
            tops = ", ".join(name for name, _ in model.named_children())
            raise UsageError(f"freeze: no module is named {prefix!r}; the model's parts are {tops}")
        modules[prefix].requires_grad_(False)
    return tuple(modules[prefix] for prefix in prefixes)
