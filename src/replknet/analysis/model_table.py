"""Every RepLKNet and every official set of weights in one table."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import timm
import torch

from replknet._errors import UsageError
from replknet.analysis.complexity import complexity
from replknet.models.family import ARCHITECTURES
from replknet.models.weights import WEIGHTS, Score, Weights


@dataclass(frozen=True)
class Row:
    """One set of weights, or one architecture that has none."""

    name: str
    """What `timm.create_model` and `replknet` commands take (with pretrained weights, for classification)."""
    task: str
    method: str | None
    """Head or detector around the backbone."""
    params: float
    """Millions, merged form; with head or detector as published, for segmentation and detection."""
    gmacs: float
    """1e9 multiply-adds (published tables: FLOPs) of one image of `cost_size`."""
    cost_size: tuple[int, int]
    input_size: tuple[int, int, int]
    num_classes: int
    trained_on: tuple[str, ...]
    scores: tuple[Score, ...]
    files: tuple[str, ...]
    urls: tuple[str, ...]
    note: str | None = None


def model_table(words: Sequence[str] = (), *, task: str | None = None) -> list[Row]:
    """Rows that contain every word; a word with `*`, `?` or `[` is a pattern of the whole name.

    Raises:
        UsageError: no row is left.
    """
    found = [
        (model, entry)
        for model, entry in _entries()
        if (task is None or task == (entry.task if entry else "classification"))
        and all(_matches(model, entry, word) for word in words)
    ]
    if not found:
        asked = " ".join(words) + (f" (task {task})" if task else "")
        raise UsageError(
            f"no RepLKNet matches {asked!r}; `replknet models` lists all, words are searched in every column"
        )
    return [_trained(entry) if entry else _untrained(model) for model, entry in found]


def _entries() -> Iterator[tuple[str, Weights | None]]:
    """Classification by model, architectures without weights among them, then the rest."""
    for model in ARCHITECTURES:
        entries = [entry for entry in WEIGHTS.values() if entry.model == model and entry.task == "classification"]
        yield from ((model, entry) for entry in entries or [None])
    yield from ((entry.model, entry) for entry in WEIGHTS.values() if entry.task != "classification")


def _matches(model: str, entry: Weights | None, word: str) -> bool:
    word = word.lower()
    name = entry.name if entry else model
    if any(sign in word for sign in "*?["):
        return fnmatchcase(name, word)
    about = (entry.task, entry.method or "", *entry.trained_on) if entry else ("classification", "untrained")
    return word in " ".join((name, *about)).lower()


def _trained(entry: Weights) -> Row:
    if entry.published_cost:
        params, gmacs, cost_size = entry.published_cost
    else:
        params, gmacs = deployed_cost(entry.model, entry.input_size, entry.num_classes)
        cost_size = entry.input_size[1:]
    return Row(
        name=entry.name,
        task=entry.task,
        method=entry.method,
        params=params,
        gmacs=gmacs,
        cost_size=cost_size,
        input_size=entry.input_size,
        num_classes=entry.num_classes,
        trained_on=entry.trained_on,
        scores=entry.scores,
        files=tuple(source.file_name for source in entry.sources),
        urls=tuple(source.url for source in entry.sources),
        note=entry.note,
    )


def _untrained(model: str) -> Row:
    cfg = timm.get_pretrained_cfg(model)
    assert cfg is not None
    params, gmacs = deployed_cost(model, cfg.input_size, cfg.num_classes)
    return Row(
        name=model,
        task="classification",
        method=None,
        params=params,
        gmacs=gmacs,
        cost_size=cfg.input_size[1:],
        input_size=cfg.input_size,
        num_classes=cfg.num_classes,
        trained_on=(),
        scores=(),
        files=(),
        urls=(),
        note="no official weights",
    )


@functools.cache
def deployed_cost(model: str, input_size: tuple[int, int, int], num_classes: int) -> tuple[float, float]:
    """Millions of parameters and 1e9 multiply-adds of a RepLKNet in the release's merged form.

    The convention of the published tables. The fused form, which does the same convolutions, is the one that is run.
    """
    kwargs = {"num_classes": num_classes, "in_chans": input_size[0], "device": torch.device("meta")}
    merged, fused = (timm.create_model(model, form=form, **kwargs).eval() for form in ("merged", "fused"))
    params = sum(parameter.numel() for parameter in merged.parameters())
    return params / 1e6, complexity(fused, input_size).macs / 1e9
