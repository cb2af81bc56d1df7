"""Figures of a classifier show the numbers that they are given."""

import numpy as np
import pytest
from PIL import Image

from replknet.plotting.classification import confusion_matrix, prediction_grid, training_curve

RECORDS = [
    {"step": 10, "train/loss": 2.0},
    {"step": 20, "train/loss": 1.0},
    {"step": 20, "val/loss": 1.2, "val/top1": 50.0},
    {"step": 40, "val/loss": 0.9, "val/top1": 75.0},
]


def lines(axes) -> dict[str, list]:
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines if line.get_label()[0] != "_"}


def test_curves_are_the_records():
    loss, accuracy = training_curve({"a": RECORDS}, target=97).axes
    assert lines(loss) == {"training": [[10, 2], [20, 1]], "test": [[20, 1.2], [40, 0.9]]}
    assert lines(accuracy) == {"test": [[20, 50], [40, 75]]}
    assert accuracy.lines[1].get_ydata()[0] == 97
    assert any(text.get_text() == "75.0 %" for text in accuracy.texts)


def test_averaged_weights_have_a_curve_and_the_last_word():
    records = [*RECORDS, {"step": 40, "val_ema/loss": 0.8, "val_ema/top1": 80.0}]
    loss, accuracy = training_curve({"a": records}).axes
    assert lines(loss)["test, averaged weights"] == [[40, 0.8]]
    assert lines(accuracy) == {"test": [[20, 50], [40, 75]], "test, averaged weights": [[40, 80]]}
    assert [text.get_text() for text in accuracy.texts] == ["80.0 %"]


def test_runs_share_a_figure():
    other = [{"step": 30, "val/top1": 60.0}]
    loss, accuracy = training_curve({"small": RECORDS, "large": other}).axes
    assert lines(accuracy) == {"small, test: 75.0 %": [[20, 50], [40, 75]], "large, test: 60.0 %": [[30, 60]]}
    assert set(lines(loss)) == {"small, training", "small, test"}
    assert len({line.get_color() for line in accuracy.lines}) == 2


def test_curves_without_validation():
    training_curve({"a": RECORDS[:2]}).canvas.draw()
    training_curve({"a": []}, target=50).canvas.draw()


def test_confusion_counts_are_written():
    axes = confusion_matrix(np.array([[5, 1], [0, 3]]), ["cat", "dog"]).axes[0]
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {(0, 0): "5", (1, 0): "1", (1, 1): "3"}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cat", "dog"]
    assert not confusion_matrix(np.eye(30, dtype=int), [str(index) for index in range(30)]).axes[0].texts
    with pytest.raises(ValueError, match="does not fit 3"):
        confusion_matrix(np.eye(2), ["a", "b", "c"])


def test_answers_are_marked():
    pictures = [Image.new("L", (8, 8)), Image.new("RGB", (8, 8))]
    figure = prediction_grid(pictures, ["a", "b"], ["a", "c"], [0.9, 0.4], columns=4)
    assert [axes.get_title() for axes in figure.axes] == ["✓ a", "✗ c, is b", "", ""]
    assert figure.axes[1].get_xlabel() == "40 %"
    figure.canvas.draw()
