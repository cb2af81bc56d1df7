"""Weights from files: every wrapper, prefix and layout met in the wild, loaded strictly and reported exactly."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from replknet._errors import RunError
from replknet.models._checkpoint_files import read_checkpoint
from replknet.models._forms import filled, form_of, take_form, twin_of
from replknet.models._layouts import canonical, fit_names, unwrap
from replknet.models.replknet import FORMS

_log = logging.getLogger(__name__)

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class LoadReport:
    """What a load did, key by key; every tuple holds names of the model's state dict (`unexpected`: the file's)."""

    source: str
    matched: tuple[str, ...]
    """Loaded."""
    missing: tuple[str, ...] = ()
    """In the model, not in the file."""
    unexpected: tuple[str, ...] = ()
    """In the file, not in the model."""
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    """In both with different shapes: name, shape in the file, shape in the model."""
    unwrapped: tuple[str, ...] = ()
    """Wrappers and prefixes that were removed, outermost first."""
    converted: str | None = None
    """What was done about different forms (training, merged, fused) of file and model."""

    @property
    def is_exact(self) -> bool:
        """Whether every key of the file went into the model and every key of the model came from the file."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        parts = [f"{self.source}: {len(self.matched)} keys loaded"]
        for label, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                parts.append(f"{len(names)} {label}: {_listed(names)}")
        if self.mismatched:
            shapes = [f"{name} {list(have)} for {list(want)}" for name, have, want in self.mismatched]
            parts.append(f"{len(shapes)} of another shape: {_listed(shapes)}")
        if self.unwrapped:
            parts.append(f"unwrapped {' / '.join(self.unwrapped)}")
        if self.converted:
            parts.append(self.converted)
        return "; ".join(parts)


def read_state_dict(path: str | Path, *, use_ema: bool = True) -> StateDict:
    """The tensors of a checkpoint file under the release's names, whatever they were wrapped in.

    Reads `.pth`, `.pt`, `.ckpt` (torch's zip and legacy formats, without running any pickled code) and safetensors;
    knows the release's wrappers, mmpretrain's and timm's layouts and Lightning checkpoints.

    Args:
        path: a file.
        use_ema: prefer the moving average of the weights where the file has one.

    Raises:
        UsageError: there is no such file.
        RunError: it is not a checkpoint, or a damaged one; the message names the file.
    """
    tensors, _ = unwrap(read_checkpoint(path), use_ema=use_ema, source=str(path))
    return canonical(tensors)


def load_checkpoint(
    model: nn.Module,
    source: str | Path | Mapping,
    *,
    may_differ: str | Iterable[str] = (),
    use_ema: bool = True,
) -> LoadReport:
    """Load weights into `model` and say exactly what matched.

    A file in the merged or fused form brings a training-form RepLKNet into that form; a file in the training form is
    merged or folded on the way into a model that already is. Any other difference is an error.

    Args:
        model: any module; RepLKNets alone, in timm's feature wrappers or inside a larger model.
        source: a file, or a mapping such as `torch.load` returns.
        may_differ: names of the model's state dict, or beginnings of names up to a dot ("head"), that may be missing,
            unexpected or of another shape; such parameters keep their values.
        use_ema: prefer the moving average of the weights where the file has one.

    Raises:
        UsageError: there is no such file.
        RunError: a damaged file, or keys or shapes that do not fit; the message lists them, says whether the file
            holds another RepLKNet, and the model keeps its weights.
    """
    name = "the given state dict" if isinstance(source, Mapping) else str(source)
    contents = source if isinstance(source, Mapping) else read_checkpoint(source)
    tensors, wrappers = unwrap(contents, use_ema=use_ema, source=name)
    allowed = (may_differ,) if isinstance(may_differ, str) else tuple(may_differ)
    tensors, prefixes = fit_names(tensors, model)
    tensors, converted = _fit_form(tensors, model, allowed, name)
    report = _compare(tensors, model, name, (*wrappers, *prefixes), converted)
    _refuse(report, model, tensors, allowed)
    own = set(report.matched)
    model.load_state_dict({k: v for k, v in tensors.items() if k in own}, strict=False)
    _log.info("%s", report)
    return report


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """timm's hook: the official layouts under the model's names, and the model in the file's form."""
    tensors, _ = unwrap(state_dict, use_ema=True, source="the pretrained weights")
    tensors, _ = fit_names(tensors, model)
    # timm itself adapts the head and the first convolution to other numbers of classes and channels.
    return _fit_form(tensors, model, ("head", "stem.0.conv"), "the pretrained weights")[0]


def _fit_form(
    tensors: StateDict, model: nn.Module, allowed: Sequence[str], source: str
) -> tuple[StateDict, str | None]:
    """Bring file and model to the later of their two forms; refuse before anything has changed."""
    have, want = form_of(tensors), form_of(model.state_dict())
    if have is None or want is None or have == want:
        return tensors, None
    if FORMS.index(have) > FORMS.index(want):
        probe = take_form(model, tensors, dry=True)
        _refuse(_compare(tensors, probe, source), model, tensors, allowed)
        take_form(model, tensors)
        return tensors, f"the model was brought into the file's {have} form"
    twin = twin_of(model, tensors)
    if twin is None:
        raise RunError(
            f"{source} is in the {have} form and {_title(model)} in the {want} form; build the model in the {have} "
            "form, load, then call replknet.reparameterize"
        )
    report = _compare(tensors, twin, source)
    _refuse(report, model, tensors, allowed)
    own = set(report.matched)
    return (
        filled(twin, {k: v for k, v in tensors.items() if k in own or _is_counter(k)}, model),
        f"the file's {have} form was brought into the model's {want} form",
    )


def _compare(
    tensors: StateDict, model: nn.Module, source: str, unwrapped: tuple[str, ...] = (), converted: str | None = None
) -> LoadReport:
    own = model.state_dict()
    both = [k for k in own if k in tensors]
    return LoadReport(
        source=source,
        matched=tuple(k for k in both if own[k].shape == tensors[k].shape),
        missing=tuple(k for k in own if k not in tensors and not _is_counter(k)),
        unexpected=tuple(k for k in tensors if k not in own and not _is_counter(k)),
        mismatched=tuple(
            (k, tuple(tensors[k].shape), tuple(own[k].shape)) for k in both if own[k].shape != tensors[k].shape
        ),
        unwrapped=unwrapped,
        converted=converted,
    )


def _refuse(report: LoadReport, model: nn.Module, tensors: StateDict, allowed: Sequence[str]) -> None:
    """Raise if anything differs that was not named; counters of batches, which frozen norms lack, never matter."""

    def forbidden(names: Iterable[str]) -> list[str]:
        return [n for n in names if not any(n == a or n.startswith(a.rstrip(".") + ".") for a in allowed)]

    missing, unexpected = forbidden(report.missing), forbidden(report.unexpected)
    wrong = set(forbidden(name for name, _, _ in report.mismatched))
    if not (missing or unexpected or wrong):
        return
    problems = []
    for label, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            problems.append(f"{len(names)} {label} ({_listed(names)})")
    if wrong:
        shapes = [f"{n} is {list(a)}, the model needs {list(b)}" for n, a, b in report.mismatched if n in wrong]
        problems.append(f"{len(shapes)} of another shape ({_listed(shapes)})")
    raise RunError(
        f"{report.source} does not fit {_title(model)}: {'; '.join(problems)}. {_advice(model, tensors, report, wrong)}"
    )


def _advice(model: nn.Module, tensors: StateDict, report: LoadReport, wrong: set[str]) -> str:
    from replknet.models._identify import identify

    found = identify(canonical(tensors))
    if found.differs_from(model) and found.description:
        return f"It is a checkpoint of another architecture: {found.description}."
    heads = [(n, a, b) for n, a, b in report.mismatched if n in wrong and n.endswith("weight")]
    if len(heads) == 1 and len(wrong) <= 2 and not report.missing and not report.unexpected:
        name, have, want = heads[0]
        return (
            f"The file has {have[0]} outputs, the model {want[0]}: build the model for {have[0]} classes, or name "
            f"{name.rpartition('.')[0]!r} in may_differ to start with a new layer."
        )
    if len(report.matched) < len(report.missing):
        return "It is a checkpoint of another architecture, and not of a RepLKNet that this package knows."
    return "Name in may_differ what may keep its values."


def _listed(names: Sequence[str], limit: int = 12) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, and {len(names) - limit} more"


def _title(model: nn.Module) -> str:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return cfg.get("architecture") or type(model).__name__


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


__all__ = ["LoadReport", "checkpoint_filter_fn", "load_checkpoint", "read_state_dict"]
