"""Shape bias: does a network name a picture by its shape or by its texture?

1280 pictures show the shape of one category with the texture of another (1200 of them: the rest show one category
twice). A decision is the category, out of 16, with the largest mean probability over its ImageNet classes; the bias is
the number of shape decisions over that of shape and texture decisions.

Source: Geirhos et al. 2019, arXiv:1811.12231, and the model-vs-human toolbox (Geirhos et al. 2021, arXiv:2106.07411).
Ding et al. 2022, arXiv:2203.06717, sec. 4.2, for RepLKNet.
"""

import csv
import functools
import importlib.resources
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as tv

from replknet._errors import RunError, UsageError
from replknet._files import write_text
from replknet.data.images import is_image_name, load_image

CLASSES = 1000
HUMAN_BIAS = 0.9587
"""Pooled over ten subjects and 12,000 decisions; computed from model-vs-human's raw data."""
HUMAN_CLASS_MEAN = 0.9538

# Shape and texture decisions of the ten subjects by shape category, counted in model-vs-human's raw data.
HUMAN_DECISIONS: dict[str, tuple[int, int]] = {
    "airplane": (443, 53), "bear": (501, 35), "bicycle": (717, 2), "bird": (581, 19),
    "boat": (348, 51), "bottle": (672, 9), "car": (671, 18), "cat": (561, 24),
    "chair": (680, 6), "clock": (705, 3), "dog": (529, 33), "elephant": (553, 21),
    "keyboard": (571, 35), "knife": (483, 59), "oven": (574, 19), "truck": (647, 11),
}  # fmt: skip

_FIELDS = ("subj", "session", "trial", "rt", "object_response", "category", "condition", "imagename")
_WEIGHTS_NOTE = "shape bias is defined by the 1000 classes of ImageNet-1K"


@functools.cache
def categories() -> dict[str, tuple[int, ...]]:
    """The 16 categories, in alphabetical order, and the ImageNet-1K class indices of each (207 in all)."""
    text = importlib.resources.files("replknet.analysis").joinpath("imagenet_16_categories.json").read_text("utf-8")
    return {name: tuple(indices) for name, indices in json.loads(text).items()}


@dataclass(frozen=True)
class Stimulus:
    """One picture: its file, and the categories of its shape and of its texture."""

    path: Path
    shape: str
    texture: str


@dataclass(frozen=True)
class Decision:
    """What was answered to one picture; `response` is one of the 16 categories, or "na" for a human's missed trial."""

    image: str
    shape: str
    texture: str
    response: str


@dataclass(frozen=True)
class Interval:
    """Bounds of a bootstrap confidence interval."""

    low: float
    high: float
    level: float


@dataclass(frozen=True)
class ShapeBias:
    """Decisions and what follows from them.

    Attributes:
        name: of the network.
        decisions: one a picture, in the order of the pictures.
    """

    name: str
    decisions: tuple[Decision, ...] = field(repr=False)

    @property
    def conflicts(self) -> list[Decision]:
        """Decisions on pictures whose shape and texture differ."""
        return [one for one in self.decisions if one.shape != one.texture]

    @property
    def shape_decisions(self) -> int:
        """Conflicts decided by shape."""
        return sum(one.response == one.shape for one in self.conflicts)

    @property
    def texture_decisions(self) -> int:
        """Conflicts decided by texture."""
        return sum(one.response == one.texture for one in self.conflicts)

    @property
    def bias(self) -> float | None:
        """Pooled shape bias; None where nothing was decided by shape or texture."""
        return _ratio(self.shape_decisions, self.texture_decisions)

    @property
    def accuracy(self) -> float:
        """Share of all pictures, also those without conflict, answered with the category of their shape."""
        return sum(one.response == one.shape for one in self.decisions) / len(self.decisions)

    def by_category(self) -> dict[str, tuple[int, int]]:
        """Shape and texture decisions by shape category, of categories that occur."""
        counts = {name: [0, 0] for name in categories() if any(one.shape == name for one in self.conflicts)}
        for one in self.conflicts:
            counts[one.shape][0] += one.response == one.shape
            counts[one.shape][1] += one.response == one.texture
        return {name: (shape, texture) for name, (shape, texture) in counts.items()}

    def category_bias(self) -> dict[str, float | None]:
        """Shape bias by shape category; None where neither was decided for."""
        return {name: _ratio(*counts) for name, counts in self.by_category().items()}

    @property
    def class_mean(self) -> float | None:
        """Mean of the categories' biases, over those that have one."""
        values = [value for value in self.category_bias().values() if value is not None]
        return float(np.mean(values)) if values else None

    def confusion(self) -> np.ndarray:
        """`[16, 16]` counts of all pictures: row the shape's category, column the answer."""
        order = {name: index for index, name in enumerate(categories())}
        matrix = np.zeros((len(order), len(order)), dtype=np.int64)
        for one in self.decisions:
            if one.response in order:
                matrix[order[one.shape], order[one.response]] += 1
        return matrix

    def confidence(self, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval | None:
        """Percentile bootstrap over the conflict pictures; None where the bias is.

        Drawing pictures with replacement is drawing the numbers of shape, texture and other decisions from a
        multinomial distribution.
        """
        if not 0 < level < 1:
            raise ValueError(f"the level is a share between 0 and 1; got {level}")
        shape, texture, total = self.shape_decisions, self.texture_decisions, len(self.conflicts)
        if shape + texture == 0:
            return None
        shares = np.array([shape, texture, total - shape - texture]) / total
        drawn = np.random.default_rng(seed).multinomial(total, shares, size=resamples)
        decided = drawn[:, 0] + drawn[:, 1]
        biases = drawn[decided > 0, 0] / decided[decided > 0]
        low, high = np.quantile(biases, [(1 - level) / 2, (1 + level) / 2])
        return Interval(float(low), float(high), level)

    def record(self) -> dict[str, object]:
        """JSON-ready account, without the single decisions."""
        interval = self.confidence()
        return {
            "name": self.name,
            "shape_bias": self.bias,
            "confidence_interval": None if interval is None else vars(interval),
            "class_mean": self.class_mean,
            "images": len(self.decisions),
            "conflicts": len(self.conflicts),
            "shape_decisions": self.shape_decisions,
            "texture_decisions": self.texture_decisions,
            "accuracy": self.accuracy,
            "by_category": {
                name: {"shape": shape, "texture": texture, "shape_bias": _ratio(shape, texture)}
                for name, (shape, texture) in self.by_category().items()
            },
            "confusion": self.confusion().tolist(),
            "categories": list(categories()),
        }


def find_stimuli(folder: Path | str) -> list[Stimulus]:
    """The cue-conflict pictures under `folder`: `SHAPE/SHAPEn-TEXTUREm.png`, sorted by category and name.

    Raises:
        UsageError: no such folder, no category folders, or a picture whose name does not say what it shows.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder; {_EXPECTED}")
    known = categories()
    present = [name for name in known if (root / name).is_dir()]
    if not present:
        raise UsageError(f"{root}: holds none of the folders {', '.join(known)}; {_EXPECTED}")
    others = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith((".", "_")))
    if strangers := [name for name in others if name not in known]:
        raise UsageError(f"{root}: {', '.join(strangers)} is none of the 16 categories {', '.join(known)}")
    stimuli = [
        _stimulus(path, name)
        for name in present
        for path in sorted((root / name).iterdir())
        if is_image_name(path.name)
    ]
    if not stimuli:
        raise UsageError(f"{root}: no pictures in its category folders; {_EXPECTED}")
    return stimuli


def decide(logits: Tensor) -> list[str]:
    """The category of every row: largest mean probability over its ImageNet classes.

    Args:
        logits: `[N, 1000]`, any floating dtype; the softmax is taken in float64.

    Raises:
        UsageError: another shape.
        RunError: NaN or infinite logits.
    """
    if logits.ndim != 2 or logits.shape[1] != CLASSES:
        raise UsageError(f"the network gave outputs {list(logits.shape)}, needed is [N, {CLASSES}]: {_WEIGHTS_NOTE}")
    if not torch.isfinite(logits).all():
        raise RunError("the network's logits hold NaN or infinity: check the weights, or use float32")
    probabilities = logits.detach().cpu().double().softmax(1)
    means = torch.stack([probabilities[:, list(indices)].mean(1) for indices in categories().values()], 1)
    names = list(categories())
    return [names[index] for index in means.argmax(1).tolist()]


@torch.no_grad()
def shape_bias(
    model: nn.Module,
    stimuli: Sequence[Stimulus],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    size: tuple[int, int] | None = None,
    name: str = "model",
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> ShapeBias:
    """Show a classifier all pictures.

    Args:
        model: images `[N, 3, H, W]` to logits `[N, 1000]`; runs in eval mode and is put back to its mode.
        stimuli: see `find_stimuli`.
        mean, std: the normalisation the network was trained with, of values in 0–1.
        size: `(H, W)` to resize the pictures to (bicubic); None leaves them as they are, 224 × 224, as model-vs-human.
        name: of the result.
        batch_size: pictures a pass.
        device: where to run.
        progress: called with the number of pictures done.

    Raises:
        UsageError: no pictures, pictures of differing sizes, or outputs that are not `[N, 1000]`.
        RunError: a picture that cannot be read (it is named), or logits that are not finite.
    """
    if not stimuli:
        raise UsageError("there are no pictures to show")
    if batch_size < 1:
        raise UsageError(f"batch_size is at least 1; got {batch_size}")
    was_training = model.training
    model.to(device).eval()
    responses: list[str] = []
    try:
        for start in range(0, len(stimuli), batch_size):
            batch = [_picture(one.path, mean, std, size) for one in stimuli[start : start + batch_size]]
            _check_sizes(batch, stimuli[start : start + batch_size])
            responses += decide(model(torch.stack(batch).to(device)))
            if progress is not None:
                progress(len(responses))
    finally:
        model.train(was_training)
    decisions = (Decision(s.path.name, s.shape, s.texture, r) for s, r in zip(stimuli, responses, strict=True))
    return ShapeBias(name, tuple(decisions))


def to_csv(result: ShapeBias) -> str:
    """model-vs-human's raw-data schema, one row a picture; its plots read files of this kind."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_FIELDS)
    for trial, one in enumerate(result.decisions, 1):
        writer.writerow([result.name, 1, trial, "NaN", one.response, one.shape, "NaN", one.image])
    return text.getvalue()


def write_csv(result: ShapeBias, folder: Path) -> Path:
    """Write `cue-conflict_NAME_session-1.csv` as model-vs-human names it."""
    stem = re.sub(r"[^\w.+-]+", "-", result.name.replace("_", "-"))
    path = folder / f"cue-conflict_{stem}_session-1.csv"
    write_text(path, to_csv(result))
    return path


def read_csv(paths: Path | Iterable[Path], *, name: str | None = None) -> ShapeBias:
    """Decisions out of model-vs-human's CSV files, of one network or of several human subjects pooled.

    Raises:
        UsageError: no such file, missing columns, or an unknown category.
    """
    files = [paths] if isinstance(paths, Path) else list(paths)
    decisions, subjects = [], []
    for path in files:
        if not path.is_file():
            raise UsageError(f"{path}: no such file")
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{(key or "").lower(): value for key, value in row.items()} for row in csv.DictReader(file)]
        missing = {"subj", "object_response", "category", "imagename"} - set(rows[0] if rows else {})
        if missing:
            raise UsageError(f"{path}: no column {', '.join(sorted(missing))}; expected {','.join(_FIELDS)}")
        for row in rows:
            shape, texture = row["category"], _texture(row["imagename"])
            if shape not in categories() or texture not in categories():
                raise UsageError(f"{path}: {row['imagename']!r} is no SHAPE-TEXTURE picture of the 16 categories")
            decisions.append(Decision(row["imagename"], shape, texture, row["object_response"]))
            subjects.append(row["subj"])
    if not decisions:
        raise UsageError("there are no files to read")
    return ShapeBias(name or subjects[0], tuple(decisions))


def human_category_bias() -> dict[str, float]:
    """Shape bias of ten human subjects by shape category."""
    return {name: shape / (shape + texture) for name, (shape, texture) in HUMAN_DECISIONS.items()}


_EXPECTED = (
    "expected are the cue-conflict pictures, SHAPE/SHAPEn-TEXTUREm.png (stimuli/style-transfer-preprocessed-512 of "
    "github.com/rgeirhos/texture-vs-shape, or `replknet shape-bias --download FOLDER`)"
)


def _ratio(shape: int, texture: int) -> float | None:
    return shape / (shape + texture) if shape + texture else None


def _texture(image_name: str) -> str:
    """`XXX_dog10-bird2.png` → `bird`."""
    return re.sub(r"\d", "", image_name.rpartition("_")[2].partition(".")[0].rpartition("-")[2])


def _stimulus(path: Path, folder: str) -> Stimulus:
    match = re.fullmatch(r"(?:.*_)?([a-z]+)\d*-([a-z]+)\d*", path.stem)
    if match is None or not {match[1], match[2]} <= set(categories()):
        raise UsageError(f"{path}: not a cue-conflict picture; its name should be like {folder}1-elephant2.png")
    if match[1] != folder:
        raise UsageError(f"{path}: a picture of the shape {match[1]} in the folder of {folder}")
    return Stimulus(path, folder, match[2])


def _picture(path: Path, mean: Sequence[float], std: Sequence[float], size: tuple[int, int] | None) -> Tensor:
    image = load_image(path, name=str(path))
    if size is not None and (image.height, image.width) != size:
        image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return tv.normalize(tv.to_tensor(image), list(mean), list(std))


def _check_sizes(batch: Sequence[Tensor], stimuli: Sequence[Stimulus]) -> None:
    for image, one in zip(batch, stimuli, strict=True):
        if image.shape != batch[0].shape:
            raise UsageError(
                f"{one.path} has {image.shape[1]} × {image.shape[2]} pixels, others have {batch[0].shape[1]} × "
                f"{batch[0].shape[2]}; give a size to resize all to"
            )


def summary(results: Mapping[str, ShapeBias] | Sequence[ShapeBias]) -> str:
    """Table of results: bias with its interval, class mean, decisions, accuracy."""
    values = list(results.values()) if isinstance(results, Mapping) else list(results)
    rows = [["", "shape bias", "95 % interval", "class mean", "shape", "texture", "of", "accuracy"]]
    for one in values:
        interval = one.confidence()
        rows.append(
            [
                one.name,
                _number(one.bias),
                "–" if interval is None else f"{interval.low:.4f}–{interval.high:.4f}",
                _number(one.class_mean),
                str(one.shape_decisions),
                str(one.texture_decisions),
                str(len(one.conflicts)),
                f"{one.accuracy:.4f}",
            ]
        )
    rows.append(["humans", f"{HUMAN_BIAS:.4f}", "", f"{HUMAN_CLASS_MEAN:.4f}", "", "", "", ""])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
