"""What the demo's report says, and in which order."""

from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

from replknet.analysis.erf import ErfResult
from replknet.analysis.erf_measures import area_ratios
from replknet.plotting import erf
from replknet.plotting.classification import confusion_matrix, prediction_grid, training_curve
from replknet.plotting.report import Report, Section, Table
from replknet.tasks.evaluation import MergeComparison
from replknet.tasks.opened_model import OpenedModel
from replknet.tasks.train import TrainResult


@dataclass(frozen=True)
class SampleAnswer:
    """One picture, its label, and the network's answer with its probability."""

    picture: Image.Image
    label: str
    answer: str
    score: float


@dataclass(frozen=True)
class DemoResult:
    """All that the demo found out."""

    opened: OpenedModel
    trained: TrainResult
    merging: MergeComparison
    answers: list[SampleAnswer]
    fields: Mapping[str, ErfResult]
    params: int
    macs: int
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    target: float


def demo_report(result: DemoResult) -> Report:
    """The report of `replknet demo`."""
    before, after = result.merging.before, result.merging.after
    total = sum(result.seconds.values())
    return Report(
        title="RepLKNet learns to read digits",
        summary=(
            f"{result.opened.name}, a large-kernel network of {result.params / 1e3:.0f} thousand parameters, was "
            f"trained on 1437 pictures of handwritten digits, scored on {before.n} others, merged, and looked into, "
            f"in {_duration(total)} on {result.versions.get('device', 'this machine')}."
        ),
        tiles=(
            (f"{before.top1:.1f} %", f"of {before.n} test pictures right, as trained"),
            (f"{after.top1:.1f} %", f"merged; {result.merging.changed or 'no'} answers changed"),
            (f"{result.merging.largest_logit_difference:.1e}", "largest logit difference after merging"),
            (_duration(result.seconds["training"]), f"of training, {result.trained.steps} steps"),
        ),
        sections=(
            _learning(result),
            _answers(result),
            _confusion(result),
            _merging(result),
            _receptive_fields(result),
            _reproduction(result),
            _next(result),
        ),
        footer="Digits: Alpaydin and Kaynak 1998, UCI Machine Learning Repository, as shipped with scikit-learn.",
    )


def _learning(result: DemoResult) -> Section:
    return Section(
        title="It learns",
        text="Training pictures are shifted and turned a little; test pictures are not. The dashed line is the aim.",
        figures=(
            (
                training_curve({"demo": result.trained.metrics}, target=result.target),
                "Loss and test accuracy during training",
            ),
        ),
    )


def _answers(result: DemoResult) -> Section:
    wrong = sum(answer.label != answer.answer for answer in result.answers)
    mistakes = result.merging.before.n - round(result.merging.before.top1 * result.merging.before.n / 100)
    shown = "all" if wrong == mistakes else f"{wrong} of"
    text = (
        "Every test picture was read correctly."
        if not mistakes
        else f"Wrong answers come first, {shown} {mistakes} of them."
    )
    grid = prediction_grid(
        [answer.picture for answer in result.answers],
        [answer.label for answer in result.answers],
        [answer.answer for answer in result.answers],
        [answer.score for answer in result.answers],
    )
    return Section(
        title="What it answers",
        text=f"{text} The number below a picture is the probability that the network gives its answer.",
        figures=((grid, "Test pictures with the network's answers"),),
    )


def _confusion(result: DemoResult) -> Section:
    counts = result.merging.before.confusion
    assert counts is not None
    return Section(
        title="What it confuses",
        text="Rows are the true digits, columns the answers; off the diagonal are the mistakes.",
        figures=((confusion_matrix(counts.numpy(), result.opened.names()), "Confusion matrix"),),
    )


def _merging(result: DemoResult) -> Section:
    merging = result.merging
    rows = [
        (name, f"{scores.top1:.2f} %", f"{scores.top5:.2f} %", f"{scores.loss:.4f}")
        for name, scores in (("as trained", merging.before), ("merged", merging.after))
    ]
    return Section(
        title="Merging changes the network and not its answers",
        text=(
            "For use, the small kernel beside each large one is added into it and every batch norm is folded into its "
            f"convolution. On all {merging.before.n} test pictures the outputs differ by at most "
            f"{merging.largest_logit_difference:.1e}, where the largest is {merging.largest_logit:.1f}."
        ),
        tables=(Table(rows, ("form", "top-1", "top-5", "cross-entropy")),),
    )


def _receptive_fields(result: DemoResult) -> Section:
    fields = {f"{name} network": field for name, field in result.fields.items()}
    size = next(iter(fields.values())).matrix.shape[0]
    areas = {name: area_ratios(field.matrix) for name, field in result.fields.items()}
    rows = [(name, *(_share(area.ratio) for area in found)) for name, found in areas.items()]
    thresholds = [f"{100 * area.threshold:g} %" for area in next(iter(areas.values()))]
    count = next(iter(fields.values())).n_images
    return Section(
        title="What one place of the last feature map sees",
        text=(
            f"The effective receptive field: how much each input pixel contributes to the centre of the last feature "
            f"map, averaged over {count} test pictures enlarged to {size} × {size} pixels. The table gives the share "
            "of the picture that holds so much of the contribution; a larger share is a wider view."
        ),
        figures=((erf.grid(fields, squares=(0.5, 0.99)), "Effective receptive fields before and after training"),),
        tables=(Table(rows, ("network", *thresholds)),),
    )


def _reproduction(result: DemoResult) -> Section:
    times = [(name, f"{value:.1f} s") for name, value in result.seconds.items()]
    times.append(("together", f"{sum(result.seconds.values()):.1f} s"))
    size = result.opened.image.size
    network = [
        ("architecture", result.opened.name),
        ("parameters", f"{result.params:,}"),
        ("multiply-adds", f"{result.macs / 1e6:.1f} million at {size} × {size}"),
        ("checkpoint", str(result.trained.last)),
    ]
    return Section(
        title="How it was made",
        tables=(
            Table(network, caption="Network"),
            Table(times, caption="Wall time"),
            Table(list(result.versions.items()), caption="Versions"),
        ),
    )


def _next(result: DemoResult) -> Section:
    last = result.trained.last
    return Section(
        title="Where to go from here",
        text="The run folder is an ordinary one: every command takes its checkpoint.",
        commands=(
            f"replknet eval --weights {last} --data digits --merged compare",
            f"replknet predict PICTURE.png --weights {last}",
            "replknet train replknet_nano --data torch/cifar10 --download true --epochs 30",
        ),
    )


def _share(ratio: float | None) -> str:
    return "more than the picture" if ratio is None else f"{100 * ratio:.1f} %"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"
