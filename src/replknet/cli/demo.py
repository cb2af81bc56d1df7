"""See the whole of it in minutes: learn, score, merge, look inside, report.

    replknet demo

trains `replknet_nano` on 1437 pictures of handwritten digits that come with scikit-learn, scores it on 360 others,
merges its small kernels and batch norms into its large kernels without changing an answer, draws what one place of its
last feature map sees before and after training, and writes runs/demo/report.html. Seeds are fixed. On two CPU cores it
takes under three minutes; nothing is downloaded.
"""

import copy
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor, nn

from replknet._errors import UsageError
from replknet._files import write_text
from replknet.analysis.complexity import complexity
from replknet.analysis.erf import ErfResult, effective_receptive_field
from replknet.analysis.erf_measures import area_ratios
from replknet.cli._demo_report import DemoResult, SampleAnswer, demo_report
from replknet.data import ImageFormat, LoaderConfig, evaluation_loader, evaluation_transform, open_dataset
from replknet.data.samples import ImageSet
from replknet.models.factory import create_model
from replknet.plotting.report import render
from replknet.tasks.evaluation import MergeComparison, compare_merged, write_result
from replknet.tasks.opened_model import OpenedModel, open_model
from replknet.tasks.run_folder import device_name, versions
from replknet.tasks.train import TrainConfig, train

MODEL = "replknet_nano"
# Pixels of the pictures in training and test, and, larger, those in which the receptive field is measured.
IMAGE_SIZE, ERF_SIZE = 32, 96
ERF_IMAGES = 40
TARGET = 97.0


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--output", type=str, default="runs/demo", help="folder for the run and report.html")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the training pictures")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")


def run(args: Namespace) -> None:
    folder = Path(args.output)
    clock = _Clock()
    _say("1/5  training replknet_nano on 1437 pictures of handwritten digits")
    with clock.part("training"):
        trained = train(_config(folder, args.epochs, args.seed))
    opened = open_model(weights=trained.last)
    _say("2/5  scoring 360 other pictures, before and after merging")
    with clock.part("scoring and merging"):
        merging = _score(opened)
    _print_scores(merging)
    _say("3/5  asking it about some of them")
    with clock.part("answers"):
        answers = _answers(opened, merging)
    _say("4/5  measuring its effective receptive field, untrained and trained")
    with clock.part("receptive fields"):
        fields = _receptive_fields(opened, args.seed)
    _say("5/5  writing the report")
    result = DemoResult(
        opened=opened,
        trained=trained,
        merging=merging,
        answers=answers,
        fields=fields,
        params=_params(opened),
        macs=complexity(opened.model, (3, IMAGE_SIZE, IMAGE_SIZE)).macs,
        seconds=clock.seconds,
        versions={**versions(), "device": _machine()},
        target=TARGET,
    )
    _write(folder, result)
    if merging.after.top1 < TARGET:
        print(
            f"replknet: {merging.after.top1:.1f} % is below the {TARGET:g} % that this reaches by default",
            file=sys.stderr,
        )
    print(folder / "report.html")


def _config(folder: Path, epochs: int, seed: int) -> TrainConfig:
    if epochs < 1:
        raise UsageError(f"epochs {epochs}: give 1 or more")
    return TrainConfig(
        model=MODEL,
        data="digits",
        output=str(folder),
        overwrite=True,
        image_size=IMAGE_SIZE,
        mean=[0.5],
        std=[0.5],
        epochs=epochs,
        global_batch=32,
        lr=4e-3,
        label_smoothing=0.05,
        seed=seed,
        # Pictures of 8×8 pixels: making them takes less time than handing them over from another process.
        loader=LoaderConfig(workers=0, channels_last=True),
        progress=sys.stderr.isatty(),
    )


def _score(opened: OpenedModel) -> MergeComparison:
    loader, _ = evaluation_loader(
        open_dataset("digits", split="validation"), opened.image, loader=LoaderConfig(workers=0)
    )
    return compare_merged(copy.deepcopy(opened.model), loader, device="cpu", confusion=True)


def _answers(opened: OpenedModel, merging: MergeComparison, shown: int = 24) -> list[SampleAnswer]:
    """Wrong answers first (up to half of `shown`), then right ones, evenly over the set."""
    images: ImageSet = open_dataset("digits", split="validation")  # type: ignore[assignment]
    transform = evaluation_transform(opened.image)
    pictures = [images.read(index, opened.image.in_chans) for index in range(len(images))]
    with torch.inference_mode():
        batches = torch.stack([transform(picture) for picture, _ in pictures]).split(64)
        scores, guesses = torch.cat([opened.model(batch).softmax(1) for batch in batches]).max(1)
    labels = torch.tensor([label for _, label in pictures])
    wrong = (guesses != labels).nonzero().flatten().tolist()[: shown // 2]
    right = (guesses == labels).nonzero().flatten().tolist()
    chosen = wrong + right[:: max(1, len(right) // (shown - len(wrong)))][: shown - len(wrong)]
    names = opened.names()
    return [
        SampleAnswer(pictures[i][0].convert("L"), names[int(labels[i])], names[int(guesses[i])], float(scores[i]))
        for i in chosen
    ]


def _receptive_fields(opened: OpenedModel, seed: int) -> dict[str, ErfResult]:
    images: ImageSet = open_dataset("digits", split="validation")  # type: ignore[assignment]
    transform = evaluation_transform(
        ImageFormat(size=ERF_SIZE, mean=opened.image.mean, std=opened.image.std, crop_mode="squash", crop_pct=1.0)
    )
    step = len(images) // ERF_IMAGES
    batch = torch.stack([transform(images.read(index * step, 3)[0]) for index in range(ERF_IMAGES)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = create_model(MODEL, num_classes=opened.outputs)
    return {"untrained": _field(untrained, batch), "trained": _field(opened.model, batch)}


def _field(model: nn.Module, batch: Tensor) -> ErfResult:
    return effective_receptive_field(model.eval(), batch, n=len(batch), batch_size=8)


def _machine() -> str:
    if torch.cuda.is_available():
        return device_name()
    threads = torch.get_num_threads()
    return f"{device_name()}, {threads} CPU thread{'s' if threads > 1 else ''}"


def _params(opened: OpenedModel) -> int:
    return sum(parameter.numel() for parameter in opened.model.parameters())


def _print_scores(merging: MergeComparison) -> None:
    before, after = merging.before, merging.after
    print(f"     as trained  {before.top1:6.2f} % of {before.n} right")
    print(f"     merged      {after.top1:6.2f} % of {after.n} right, {merging.changed} answers changed")
    print(
        f"     largest logit difference {merging.largest_logit_difference:.1e} "
        f"(largest logit {merging.largest_logit:.1f})",
        flush=True,
    )


def _write(folder: Path, result: DemoResult) -> None:
    write_text(folder / "report.html", render(demo_report(result)))
    areas = {
        name: {f"{area.threshold:g}": area.ratio for area in area_ratios(field.matrix)}
        for name, field in result.fields.items()
    }
    record = {
        "evaluation": result.merging.as_dict(),
        "erf_area_ratios": areas,
        "seconds": result.seconds,
        "versions": result.versions,
    }
    write_result(folder / "demo.json", record)


def _say(text: str) -> None:
    print(text, flush=True)


@dataclass
class _Clock:
    """Wall time of each part."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begin
