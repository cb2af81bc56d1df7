"""Weights from one layout, form and container to another, with an account of what was done.

| layout | names | container |
|---|---|---|
| `official` | the release's: `stem.0.conv.weight`, `head.weight` | raw state dict |
| `timm` | the same; timm's RepLKNets bear the release's names | raw state dict, as safetensors by habit |
| `mmpretrain` | `backbone.stem.0.*`, the final norm `backbone.stages.3.norm.*`, `head.fc.*` | under `state_dict` |

A target that ends in `.safetensors` is written as such, any other as a torch file. Forms go one way: train, merged
(the release's deploy form), fused (batch norms folded too; only this package reads it).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from torch import Tensor

from replknet._errors import RunError, UsageError
from replknet._files import replacing
from replknet.layers import reparameterize
from replknet.models._checkpoint_files import read_checkpoint
from replknet.models._forms import form_of
from replknet.models._identify import identify
from replknet.models._layouts import canonical, unwrap
from replknet.models.replknet import FORMS, Form, RepLKNet

Layout = Literal["official", "timm", "mmpretrain"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

StateDict = dict[str, Tensor]
_OWN = re.compile(r"(stem|stages|transitions|norm|head)\.")
_BACKBONE = re.compile(r"(stem|stages|transitions|norm)\.")


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion found and did."""

    source: str
    target: str
    network: str
    """The named model the weights fit, or what is known of another."""
    unwrapped: tuple[str, ...]
    """Wrappers and prefixes taken off, outermost first."""
    form: tuple[Form | None, Form | None]
    """Before and after; None for other networks."""
    layout: Layout
    keys: int
    """Tensors written."""
    renamed: int
    """Of these, under another name than in the source (inside its wrappers)."""
    dropped: tuple[str, ...]
    """Tensors that were asked to be left out, or merged into others."""
    exact: bool
    """Every tensor is bit for bit the source's."""
    max_difference: float | None
    """Largest change of the outputs on a test image where the form was changed, relative to the largest output."""

    def __str__(self) -> str:
        before, after = self.form
        parts = [f"{self.source} -> {self.target}: {self.network}; {self.keys} tensors, {self.renamed} renamed"]
        if self.unwrapped:
            parts.append(f"unwrapped {' / '.join(self.unwrapped)}")
        if before != after:
            parts.append(f"{before} form to {after} form, outputs change by {self.max_difference:.1e} of the largest")
        if self.dropped and before == after:
            more = ", ..." if len(self.dropped) > 4 else ""
            parts.append(f"{len(self.dropped)} left out: {', '.join(self.dropped[:4])}{more}")
        parts.append("values unchanged" if self.exact else "values recomputed where merged")
        return "; ".join(parts)


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    layout: Layout = "official",
    form: Form | None = None,
    backbone_only: bool = False,
    use_ema: bool = True,
    overwrite: bool = False,
) -> ConversionReport:
    """Read weights of any known layout and write them in another, whole or not at all.

    Args:
        source: a checkpoint file: official, of `replknet train`, mmpretrain's, timm's; torch or safetensors.
        target: the file to write.
        layout: names and wrapping of the target.
        form: form of the target; None keeps the source's.
        backbone_only: leave out the head, and whatever else surrounds the backbone in a segmentation or detection
            checkpoint.
        use_ema: prefer the moving average of the weights where the source has one.
        overwrite: replace an existing target.

    Raises:
        UsageError: no such source, an existing target, an unknown layout or form, or a combination that does not exist.
        RunError: a damaged source; weights that are not a RepLKNet's where names or form would have to change.
    """
    source, target = Path(source), Path(target)
    _check_request(source, target, layout, form, overwrite)
    found, wrappers = unwrap(read_checkpoint(source), use_ema=use_ema, source=str(source))
    tensors = canonical(found)
    origin = _origins(found, tensors)
    if backbone_only:
        tensors = {name: tensor for name, tensor in tensors.items() if _BACKBONE.match(name)}
    before = form_of(tensors)
    after, changed, difference = _take_form(tensors, form, str(source))
    written = _named(changed, layout, after, str(source))
    _write(written, target, layout, {"form": str(after or ""), "layout": layout})
    return ConversionReport(
        source=str(source),
        target=str(target),
        network=identify(tensors).description.removeprefix("it fits ") or "not a RepLKNet",
        unwrapped=wrappers,
        form=(before, after),
        layout=layout,
        keys=len(written),
        renamed=sum(name not in found for name in written),
        dropped=tuple(name for name in origin if name not in changed),
        exact=all(name in origin and torch.equal(found[origin[name]], changed[name]) for name in changed),
        max_difference=difference,
    )


def _check_request(source: Path, target: Path, layout: str, form: str | None, overwrite: bool) -> None:
    if layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    if form is not None and form not in FORMS:
        raise UsageError(f"unknown form {form!r}; known: {', '.join(FORMS)}")
    if form == "fused" and layout != "timm":
        raise UsageError(f"the fused form has no {layout} layout: nothing but this package reads it; use layout timm")
    if target.is_dir():
        raise UsageError(f"{target} is a folder; give the name of the file to write")
    if target.exists() and target.resolve() == source.resolve():
        raise UsageError(f"source and target are the same file, {source}")
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists; choose another name or ask to overwrite it")


def _origins(found: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name in the release's layout to name in the source."""
    by_identity = {id(tensor): name for name, tensor in found.items()}
    return {name: by_identity[id(tensor)] for name, tensor in tensors.items()}


def _take_form(tensors: StateDict, form: Form | None, source: str) -> tuple[Form | None, StateDict, float | None]:
    before = form_of(tensors)
    if form is None or form == before:
        return before, tensors, None
    if before is None:
        raise RunError(f"{source} does not hold a RepLKNet, so there is nothing to bring into the {form} form")
    if FORMS.index(form) < FORMS.index(before):
        raise UsageError(f"{source} is in the {before} form; merging is one way, it cannot go back to {form}")
    network = network_of(tensors, source)
    probe = torch.randn(1, network.in_chans, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = network(probe)
        got = reparameterize(network, fold_norms=form == "fused")(probe)
    difference = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
    dtype = tensors["stem.0.conv.weight"].dtype
    state = network.state_dict()
    changed = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    return form, changed, difference


def network_of(tensors: Mapping[str, Tensor], source: str = "the given state dict") -> RepLKNet:
    """The RepLKNet that a state dict under the release's names belongs to, with these weights, in evaluation mode.

    Shapes tell all but the stem's stride, which is the release's 4 here and does not concern weights.

    Raises:
        RunError: not a RepLKNet's, or incomplete.
    """
    identity = identify(tensors)
    if not identity.layers:
        raise RunError(f"{source} does not hold a complete RepLKNet")
    network = RepLKNet(**_config(tensors, identity.layers, identity.channels, identity.kernel_sizes), device="meta")
    own = network.state_dict()
    counters = {name: torch.tensor(0) for name in own if name.endswith("num_batches_tracked")}
    state = {**counters, **{name: _as_float(tensor) for name, tensor in tensors.items()}}
    missing = [name for name in own if name not in state]
    extra = [name for name in state if name not in own]
    wrong = [name for name in own if name in state and state[name].shape != own[name].shape]
    if missing or extra or wrong:
        raise RunError(
            f"{source} is not a whole RepLKNet: {len(missing)} tensors missing {missing[:4]}, {len(extra)} unknown "
            f"{extra[:4]}, {len(wrong)} of another shape {wrong[:4]}"
        )
    network.load_state_dict(state, assign=True)
    return network.eval()


def _as_float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _config(tensors: Mapping[str, Tensor], layers: tuple, channels: tuple, kernel_sizes: tuple) -> dict[str, Any]:
    block, ffn = "stages.0.blocks.0", "stages.0.blocks.1"
    small = tensors.get(f"{block}.large_kernel.small_conv.conv.weight")
    head, stem = tensors.get("head.weight"), tensors["stem.0.conv.weight"]
    return {
        "layers": layers,
        "channels": channels,
        "kernel_sizes": kernel_sizes,
        "small_kernel": None if small is None else small.shape[-1],
        "dw_ratio": tensors[f"{block}.pw1.conv.weight"].shape[0] / channels[0],
        "ffn_ratio": tensors[f"{ffn}.pw1.conv.weight"].shape[0] / channels[0],
        "in_chans": stem.shape[1],
        "num_classes": 0 if head is None else head.shape[0],
        "norm_features": [stage for stage in range(len(layers)) if f"stages.{stage}.norm.weight" in tensors],
        "form": form_of(tensors),
    }


def _named(tensors: StateDict, layout: Layout, form: Form | None, source: str) -> StateDict:
    if form == "fused" and layout != "timm":
        raise UsageError(
            f"{source} is in the fused form, which has no {layout} layout: nothing but this package reads it; use "
            "layout timm, or start from the training form"
        )
    if layout != "mmpretrain":
        return tensors
    strange = [name for name in tensors if not _OWN.match(name)]
    if form is None or strange:
        raise RunError(
            f"{source} holds more or other than a RepLKNet classifier ({', '.join(strange[:3])}), which mmpretrain's "
            "layout has no names for; take the backbone only"
        )
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("stages."))
    if "norm.weight" in tensors and f"stages.{last}.norm.weight" in tensors:
        raise RunError(f"{source} has normalised feature maps and a final norm: mmpretrain has one name for both")
    return {_mmpretrain_name(name, last): tensor for name, tensor in tensors.items()}


def _mmpretrain_name(name: str, last_stage: int) -> str:
    if name.startswith("head."):
        return name.replace("head.", "head.fc.", 1)
    return f"backbone.stages.{last_stage}.{name}" if name.startswith("norm.") else f"backbone.{name}"


def _write(tensors: StateDict, target: Path, layout: Layout, metadata: dict[str, str]) -> None:
    # Tensors that share memory (views of one storage) are written as themselves only.
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    with replacing(target) as temporary:
        if target.suffix == ".safetensors":
            safetensors.torch.save_file(whole, temporary, metadata={"format": "pt", **metadata})
        elif layout == "mmpretrain":
            torch.save({"meta": metadata, "state_dict": whole}, temporary)
        else:
            torch.save(whole, temporary)
