"""The shape-bias figure: lines at the pooled biases, points at the categories'."""

import numpy as np
import pytest

from replknet.analysis.shape_bias import Decision, ShapeBias, categories
from replknet.plotting import shape_bias as figures


def made_up(name, *answers):
    return ShapeBias(name, tuple(Decision(f"{s}1-{t}1.png", s, t, r) for s, t, r in answers))


@pytest.fixture
def results():
    first = made_up(
        "first", ("cat", "dog", "cat"), ("cat", "dog", "dog"), ("oven", "car", "car"), ("boat", "car", "car")
    )
    return [first, made_up("second", ("cat", "dog", "cat")), made_up("undecided", ("cat", "dog", "knife"))]


def test_lines_and_points(results):
    figure = figures.shape_bias(results)
    axes = figure.axes[0]
    assert [line.get_xdata()[0] for line in axes.lines] == pytest.approx([0.75, 0.0, 1 - 0.9587])
    points = {collection.get_label(): np.asarray(collection.get_offsets()) for collection in axes.collections}
    assert sorted(points["first (25.0%)"][:, 0]) == [0.5, 1.0, 1.0]
    assert points["humans (95.9%)"].shape == (16, 2)
    assert len(points["undecided"]) == 0
    rows = [label.get_text() for label in axes.get_yticklabels()]
    cat = points["second (100.0%)"][0, 1]
    assert rows[round(cat)] == "cat"
    assert sorted(rows) == list(categories())


def test_without_humans(results):
    figure = figures.shape_bias(results[:1], humans=False)
    assert len(figure.axes[0].lines) == 1


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_saved(results, tmp_path, suffix):
    assert figures.save(figures.shape_bias(results), tmp_path / f"a.{suffix}").stat().st_size > 1000
    assert figures.save(figures.confusion(results[0]), tmp_path / f"b.{suffix}").stat().st_size > 1000


def test_confusion_rows_are_shares(results):
    shares = figures.confusion(results[0]).axes[0].images[0].get_array()
    names = list(categories())
    assert shares[names.index("cat"), names.index("dog")] == 0.5
    assert shares[names.index("dog")].sum() == 0


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="at least one"):
        figures.shape_bias([])
