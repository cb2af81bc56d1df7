"""Training, merged and fused forms of state dicts and models, told apart and brought together."""

from collections.abc import Mapping

from torch import Tensor, nn

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


def twin_of(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module | None:
    """A model on the meta device like `model`, but in the form, with the classes and input channels of `tensors`.

    None if `model` is neither a RepLKNet nor timm's `FeatureGetterNet` around one: then it cannot be built again.
    """
    inner = getattr(model, "model", model)
    if not isinstance(inner, RepLKNet):
        return None
    prefix = "" if inner is model else "model."
    head, stem = tensors.get(f"{prefix}head.weight"), tensors.get(f"{prefix}stem.0.conv.weight")
    changes = {
        "form": form_of(tensors),
        "device": "meta",
        "dtype": None,
        "num_classes": 0 if head is None else len(head),
        "in_chans": inner.in_chans if stem is None else stem.shape[1],
    }
    net = RepLKNet(**{**inner.config, **changes})
    if len(inner.stages) < len(net.stages):
        net.prune_intermediate_layers(range(len(inner.stages)))
    if isinstance(inner.norm, nn.Identity) and not inner.norm_in_head:
        net.norm = nn.Identity()
    if inner is model:
        return net
    holder = nn.Module()
    holder.model = net
    return holder


def filled(twin: nn.Module, tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state dict of `twin` after it has taken `tensors` as its own and the form of `model`."""
    twin.load_state_dict(tensors, strict=False, assign=True)
    _reparameterize_like(twin.eval(), model.state_dict())
    return twin.state_dict()


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
