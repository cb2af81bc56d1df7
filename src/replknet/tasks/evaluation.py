"""Scoring a classifier: every picture once, at any number of processes, before and after merging."""

import copy
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from replknet._errors import UsageError
from replknet._files import write_text
from replknet.data.meter import ThroughputMeter
from replknet.data.samples import IGNORE
from replknet.layers import reparameterize

# A table of 22K x 22K counts takes 4 GB; nobody reads it.
_LARGEST_CONFUSION = 5000

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationResult:
    """Scores over all processes.

    Attributes:
        top1, top5: percent of the pictures; top5 is top-k with k = min(5, classes considered).
        loss: mean cross-entropy over the classes considered.
        n: pictures that were scored.
        classes: outputs that could win.
        not_finite: pictures for which an output was NaN or infinite; they count as wrong.
        real_top1, real_n: percent and number by ReaL labels, if asked for.
        seconds, images_per_second: of the whole pass, loading included, over all processes.
        wait_share: share of that time spent waiting for the loader, on this process.
        confusion: `[outputs, outputs]` int64, row = label, column = answer, if asked for.
    """

    top1: float
    top5: float
    loss: float
    n: int
    classes: int
    not_finite: int
    seconds: float
    images_per_second: float
    wait_share: float
    real_top1: float | None = None
    real_n: int | None = None
    confusion: Tensor | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, the confusion matrix as nested lists."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        if self.confusion is not None:
            values["confusion"] = self.confusion.tolist()
        return values


@dataclass(frozen=True)
class MergeComparison:
    """The same pictures through a network before and after re-parameterisation.

    Attributes:
        before, after: scores.
        largest_logit_difference: over all pictures and outputs.
        largest_logit: largest absolute output before merging, the scale of the difference.
        changed: pictures whose answer differs.
    """

    before: EvaluationResult
    after: EvaluationResult
    largest_logit_difference: float
    largest_logit: float
    changed: int

    @property
    def relative_difference(self) -> float:
        return self.largest_logit_difference / self.largest_logit if self.largest_logit else 0.0

    def as_dict(self) -> dict[str, Any]:
        extra = {"relative_difference": self.relative_difference}
        return {"before": self.before.as_dict(), "after": self.after.as_dict(), **asdict_flat(self), **extra}


def evaluate(
    model: nn.Module,
    loader: Iterable,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    outputs: Sequence[int] | None = None,
    real_labels: Sequence[Sequence[int]] | None = None,
    confusion: bool = False,
    channels_last: bool = False,
    on_batch: Callable[[int], None] | None = None,
    on_device: Callable[[Tensor], Tensor] | None = None,
) -> EvaluationResult:
    """Score `model` on the batches `(images, labels)` of a loader.

    Args:
        model: images `[N, C, H, W]` → logits `[N, outputs]`; put in evaluation mode and on `device`, and for float64
            in that precision.
        loader: from `replknet.data.evaluation_loader`; labels are outputs of the network, `IGNORE` does not count.
        device: where to run; that of the model by default.
        dtype: float32 (without TF32), or bfloat16/float16 for autocast, or float64.
        outputs: outputs that may win, for test sets of fewer classes (ImageNet-A, -R); all by default.
        real_labels: for every sample index the labels that are right; the loader then gives the index too, and
            pictures without any are left out of this score.
        confusion: count labels against answers.
        channels_last: run in that memory format.
        on_batch: called with the number of pictures after every batch.
        on_device: applied to the images on the device (uint8 batches are normalised there).

    Returns:
        Scores summed over all processes of torch.distributed if it is in use; equal on every process.
    """
    (result,), _ = _run(
        [model], loader, device, dtype, outputs, real_labels, confusion, channels_last, on_batch, on_device
    )
    return result


def compare_merged(
    model: nn.Module,
    loader: Iterable,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    outputs: Sequence[int] | None = None,
    real_labels: Sequence[Sequence[int]] | None = None,
    confusion: bool = False,
    channels_last: bool = False,
    on_batch: Callable[[int], None] | None = None,
    on_device: Callable[[Tensor], Tensor] | None = None,
) -> MergeComparison:
    """Score `model` and a re-parameterised copy of it on the same batches; arguments as for `evaluate`."""
    # Merged in the precision that it runs in, so that only the merging shows.
    merged = copy.deepcopy(model).eval()
    merged = reparameterize(merged.double() if dtype == torch.float64 else merged)
    (before, after), difference = _run(
        [model, merged], loader, device, dtype, outputs, real_labels, confusion, channels_last, on_batch, on_device
    )
    largest, scale, changed = difference
    return MergeComparison(before, after, largest, scale, int(changed))


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON; a name that exists is replaced at once or not at all."""
    write_text(path, json.dumps(result, indent=1, allow_nan=True) + "\n")


def markdown_row(model: str, weights: str, data: str, size: int, form: str, result: EvaluationResult) -> str:
    """A row under `MARKDOWN_HEAD`."""
    real = "–" if result.real_top1 is None else f"{result.real_top1:.2f}"
    return (
        f"| {model} | {weights} | {data} | {size} | {form} | {result.top1:.2f} | {result.top5:.2f} | {real} | "
        f"{result.n} | {result.classes} |"
    )


MARKDOWN_HEAD = (
    "| model | weights | data | res. | form | top-1 | top-5 | ReaL | n | classes |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def asdict_flat(comparison: MergeComparison) -> dict[str, Any]:
    """The numbers of a comparison without its two results."""
    return {name: value for name, value in vars(comparison).items() if name not in ("before", "after")}


def _run(
    models: list[nn.Module],
    loader: Iterable,
    device: torch.device | str | None,
    dtype: torch.dtype,
    outputs: Sequence[int] | None,
    real_labels: Sequence[Sequence[int]] | None,
    confusion: bool,
    channels_last: bool,
    on_batch: Callable[[int], None] | None,
    on_device: Callable[[Tensor], Tensor] | None,
) -> tuple[list[EvaluationResult], tuple[float, float, float]]:
    place = torch.device(device) if device is not None else next(models[0].parameters()).device
    models = [_prepare(model, place, dtype, channels_last) for model in models]
    scores = [_Scores(place, outputs, real_labels, confusion) for _ in models]
    difference = torch.zeros(3, dtype=torch.float64, device=place)
    meter = ThroughputMeter()
    with torch.inference_mode(), _autocast(place, dtype), _no_tf32():
        for images, labels, *index in meter.iterate(loader, lambda batch: len(batch[1])):
            images = images.to(place, non_blocking=True)
            images = on_device(images) if on_device is not None else images
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            images = images.double() if dtype == torch.float64 else images
            labels = labels.to(place, non_blocking=True)
            logits = [model(images) for model in models]
            for score, output in zip(scores, logits, strict=True):
                score.add(output, labels, index[0] if index else None)
            if len(logits) == 2:
                _widen(difference, logits[0], logits[1], labels)
            if on_batch is not None:
                on_batch(int((labels != IGNORE).sum()))
    totals = [score.total() for score in scores]
    throughput = meter.result()
    seconds = _reduce(torch.tensor(throughput.seconds, dtype=torch.float64, device=place), dist.ReduceOp.MAX)
    results = [
        score.result(total, float(seconds), throughput.wait_share) for score, total in zip(scores, totals, strict=True)
    ]
    largest = _reduce(difference[:2].clone(), dist.ReduceOp.MAX)
    changed = _reduce(difference[2].clone(), dist.ReduceOp.SUM)
    return results, (float(largest[0]), float(largest[1]), float(changed))


class _Scores:
    """Sums for one network, on the device, so that no batch waits for the one before."""

    def __init__(
        self,
        device: torch.device,
        outputs: Sequence[int] | None,
        real_labels: Sequence[Sequence[int]] | None,
        confusion: bool,
    ):
        # right at 1, right at 5, scored, not finite, loss, right by ReaL, scored by ReaL
        self.sums = torch.zeros(7, dtype=torch.float64, device=device)
        self.outputs = None if outputs is None else torch.tensor(sorted(set(outputs)), device=device)
        self.real_labels, self.wants_confusion = real_labels, confusion
        self.confusion: Any = None
        self.classes = 0

    def add(self, logits: Tensor, labels: Tensor, index: Tensor | None) -> None:
        logits = logits.float() if logits.dtype != torch.float64 else logits
        outputs = logits.shape[1]
        self._check(labels, outputs)
        self.classes = outputs if self.outputs is None else len(self.outputs)
        counts = labels != IGNORE
        finite = logits.isfinite().all(1)
        if self.outputs is not None:
            shut = torch.ones(outputs, dtype=torch.bool, device=logits.device).index_fill(0, self.outputs, False)
            logits = logits.masked_fill(shut, float("-inf"))
        ranked = logits.topk(min(5, self.classes), dim=1).indices
        right = (ranked == labels[:, None]) & (counts & finite)[:, None]
        loss = nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)
        columns = (right[:, 0], right.any(1), counts, counts & ~finite, loss)
        self.sums[:5] += torch.stack([column.sum().double() for column in columns])
        if self.wants_confusion:
            self._confuse(ranked[:, 0], labels, outputs)
        if self.real_labels is not None:
            self._add_real(ranked[:, 0], index, counts)

    def total(self) -> list[float]:
        return _reduce(self.sums, dist.ReduceOp.SUM).tolist()

    def result(self, total: list[float], seconds: float, wait_share: float) -> EvaluationResult:
        right1, right5, n, not_finite, loss, real_right, real_n = total
        if not n:
            raise UsageError("no picture was scored: the data are empty, or every picture is broken")
        if not_finite:
            _logger.warning("the network gave NaN or infinite values for %d of %d pictures", not_finite, n)
        return EvaluationResult(
            top1=100 * right1 / n,
            top5=100 * right5 / n,
            loss=loss / n,
            n=int(n),
            classes=self.classes,
            not_finite=int(not_finite),
            seconds=seconds,
            images_per_second=n / seconds if seconds > 0 else 0.0,
            wait_share=wait_share,
            real_top1=100 * real_right / real_n if self.real_labels is not None and real_n else None,
            real_n=int(real_n) if self.real_labels is not None else None,
            confusion=None if self.confusion is None else self.confusion.compute().long().cpu(),
        )

    def _check(self, labels: Tensor, outputs: int) -> None:
        # On a GPU the comparison would wait for the device at every batch; its own assertion fails there too.
        if labels.device.type == "cpu" and len(labels) and int(labels.max()) >= outputs:
            raise UsageError(f"the data have a class {int(labels.max())} and the network {outputs} outputs")

    def _confuse(self, answers: Tensor, labels: Tensor, outputs: int) -> None:
        if self.confusion is None:
            if outputs > _LARGEST_CONFUSION:
                raise UsageError(
                    f"a confusion matrix of {outputs} classes is too large; the limit is {_LARGEST_CONFUSION}"
                )
            from torchmetrics.classification import MulticlassConfusionMatrix

            # Answers and labels are checked above.
            self.confusion = MulticlassConfusionMatrix(outputs, ignore_index=IGNORE, validate_args=False).to(
                labels.device
            )
        self.confusion.update(answers, labels)

    def _add_real(self, answers: Tensor, index: Tensor | None, counts: Tensor) -> None:
        if index is None:
            raise UsageError("ReaL labels need a loader that gives the index of each sample")
        labels = self.real_labels or ()
        rows = zip(answers.tolist(), index.tolist(), counts.tolist(), strict=True)
        hits = [answer in labels[number] for answer, number, real in rows if real and labels[number]]
        self.sums[5] += sum(hits)
        self.sums[6] += len(hits)


def _prepare(model: nn.Module, device: torch.device, dtype: torch.dtype, channels_last: bool) -> nn.Module:
    model = model.to(device).eval()
    if dtype == torch.float64:
        model = model.double()
    return model.to(memory_format=torch.channels_last) if channels_last else model  # type: ignore[call-overload]


def _autocast(device: torch.device, dtype: torch.dtype):
    if dtype in (torch.float32, torch.float64):
        return nullcontext()
    if dtype not in (torch.bfloat16, torch.float16):
        raise UsageError(f"dtype {dtype}: give float32, float64, bfloat16 or float16")
    return torch.autocast(device.type, dtype)


@contextmanager
def _no_tf32() -> Iterator[None]:
    """A score in float32 means float32: torch's default of TF32 in convolutions changes answers near a tie."""
    settings: Any = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # pyright: ignore[reportAttributeAccessIssue]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def _widen(difference: Tensor, before: Tensor, after: Tensor, labels: Tensor) -> None:
    counts = labels != IGNORE
    before, after = before[counts].double(), after[counts].double()
    if not len(before):
        return
    difference[0] = torch.maximum(difference[0], (before - after).abs().max())
    difference[1] = torch.maximum(difference[1], before.abs().max())
    difference[2] += (before.argmax(1) != after.argmax(1)).sum()


def _reduce(value: Tensor, operation: Any) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        value = value.clone()
        dist.all_reduce(value, op=operation)
    return value
