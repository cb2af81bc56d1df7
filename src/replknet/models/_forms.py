"""Training, merged and fused forms of state dicts and models, told apart and brought together."""

from collections.abc import Mapping

from torch import Tensor, nn

from replknet._errors import RunError
from replknet.layers import reparameterize
from replknet.layers.empty_copy import empty_copy
from replknet.models.replknet import Form, RepLKNet


def form_of(tensors: Mapping[str, Tensor]) -> Form | None:
    """The form that a RepLKNet's names show; None for other networks."""
    if not any(".large_kernel." in k for k in tensors):
        return None
    if not any(".large_kernel.lkb_reparam." in k for k in tensors):
        return "train"
    return "merged" if any(k.endswith(".prelkb_bn.weight") for k in tensors) else "fused"


def take_form(model: nn.Module, tensors: Mapping[str, Tensor], *, dry: bool = False) -> nn.Module:
    """Bring the RepLKNets in `model` into the form of `tensors`, in place and whatever the training mode.

    Args:
        model: changed, unless `dry`.
        tensors: under the model's names.
        dry: leave `model` alone and change a copy without data on the meta device.
    """
    if dry:
        model = empty_copy(model)
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    _reparameterize_like(model, tensors)
    for name, module in model.named_modules():
        module.training = modes.get(name, modes[""])
    return model


def as_form_of_model(tensors: dict[str, Tensor], model: nn.Module, source: str) -> dict[str, Tensor]:
    """Training-form weights merged, or merged ones folded, to the form of `model`.

    Raises:
        RunError: `model` is not a RepLKNet itself, so that its training form cannot be rebuilt; or the weights do not
            fit it.
    """
    prefix = "model." if isinstance(getattr(model, "model", None), RepLKNet) else ""
    net = model.model if prefix else model
    if not isinstance(net, RepLKNet):
        raise RunError(f"{source} is in the training form, the model is not: load it first, then reparameterize")
    inner = {k.removeprefix(prefix): v for k, v in tensors.items()}
    have = form_of(inner)
    assert have is not None
    twin = _twin(net, inner, have)
    state = {k: v for k, v in inner.items() if not k.endswith("num_batches_tracked")}
    result = twin.load_state_dict(state, strict=False, assign=True)
    missing = [k for k in result.missing_keys if not k.endswith("num_batches_tracked") and not k.startswith("norm")]
    if missing or result.unexpected_keys:
        lists = f"missing {missing[:12]}, unexpected {result.unexpected_keys[:12]}"
        raise RunError(f"{source} does not fit {type(net).__name__} in the {have} form: {lists}")
    _reparameterize_like(twin.eval(), {k.removeprefix(prefix): v for k, v in model.state_dict().items()})
    return {prefix + k: v for k, v in twin.state_dict().items()}


def _twin(net: RepLKNet, tensors: Mapping[str, Tensor], form: Form) -> RepLKNet:
    """A network on the meta device like `net`, with the head and the input channels of `tensors`."""
    head = tensors.get("head.weight")
    stem = tensors.get("stem.0.conv.weight")
    changes = {
        "form": form,
        "device": "meta",
        "dtype": None,
        "num_classes": 0 if head is None else len(head),
        "in_chans": net.in_chans if stem is None else stem.shape[1],
    }
    return RepLKNet(**{**net.config, **changes})


def _reparameterize_like(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Go to the form of `tensors`; a final norm in front of the head stays where `tensors` have one."""
    form = form_of(tensors)
    if form == "merged":
        reparameterize(model, fold_norms=False)
    if form != "fused":
        return
    for name, net in [(n, m) for n, m in model.named_modules() if isinstance(m, RepLKNet)]:
        keeps_norm = f"{name}.norm.weight".lstrip(".") in tensors
        for part in net.children() if keeps_norm else (net,):
            reparameterize(part)
    for child in model.children():
        reparameterize(child)
