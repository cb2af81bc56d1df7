"""Pictures by file, folder and pattern."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from replknet._errors import UsageError
from replknet.data import ImageFormat
from replknet.tasks.prediction import find_inputs, predict


class Brightness(nn.Module):
    """The brighter the picture, the higher the class."""

    def forward(self, images):
        level = images.mean((1, 2, 3))
        return -10 * (torch.linspace(0, 1, 6) - level[:, None]).abs()


@pytest.fixture
def folder(tmp_path):
    for index in range(6):
        Image.new("RGB", (20, 30), (51 * index,) * 3).save(tmp_path / f"{index}.png")
    (tmp_path / "broken.jpg").write_bytes(b"text")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "sub").mkdir()
    Image.fromarray(np.full((9, 9), 255, np.uint8)).save(tmp_path / "sub" / "grey.PNG")
    return tmp_path


def names(paths, folder):
    return [str(path.relative_to(folder)) for path in paths]


def test_inputs_are_found_once_in_order(folder):
    everything = find_inputs([str(folder)])
    assert names(everything, folder) == [*(f"{index}.png" for index in range(6)), "broken.jpg", "sub/grey.PNG"]
    twice = find_inputs([str(folder / "3.png"), str(folder / "[1-3].png"), str(folder / "3.png")])
    assert names(twice, folder) == ["3.png", "1.png", "2.png"]
    assert names(find_inputs([str(folder / "**" / "*.PNG")]), folder) == ["sub/grey.PNG"]
    assert names(find_inputs([str(folder / "notes.txt")]), folder) == ["notes.txt"]
    (folder / "[odd].png").write_bytes((folder / "0.png").read_bytes())
    assert names(find_inputs([str(folder / "[odd].png")]), folder) == ["[odd].png"]


@pytest.mark.parametrize(
    ("name", "message"), [("absent.png", "no such file"), ("*.bmp", "no file fits"), ("void", "no pictures")]
)
def test_missing_inputs_are_named(folder, name, message):
    (folder / "void").mkdir()
    with pytest.raises(UsageError, match=message):
        find_inputs([str(folder / name)])


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_answers_stay_with_their_pictures(folder, batch_size):
    paths = [*find_inputs([str(folder)]), folder / "gone.png"]
    image = ImageFormat(16, mean=(0,), std=(1,))
    found = list(predict(Brightness(), paths, image, top=3, batch_size=batch_size))
    assert [prediction.path for prediction in found] == paths
    assert [prediction.classes[:1] for prediction in found] == [*((index,) for index in range(6)), (), (5,), ()]
    assert "not a picture" in (found[6].error or "")
    assert "no such file" in (found[8].error or "")
    for prediction in found:
        assert list(prediction.scores) == sorted(prediction.scores, reverse=True)
        assert len(prediction.scores) == (0 if prediction.error else 3)


def test_more_classes_than_there_are(folder):
    (prediction,) = predict(Brightness(), [folder / "2.png"], ImageFormat(16), top=50)
    assert len(prediction.classes) == 6
    assert sum(prediction.scores) == pytest.approx(1)
    with pytest.raises(UsageError, match="top 0"):
        list(predict(Brightness(), [folder / "2.png"], ImageFormat(16), top=0))


def test_an_answer_that_is_no_number_is_an_error(folder):
    class Undefined(Brightness):
        def forward(self, images):
            return super().forward(images) / (images.mean((1, 2, 3))[:, None] > 0.5)

    paths = [folder / f"{index}.png" for index in range(6)]
    found = list(predict(Undefined(), paths, ImageFormat(16, mean=(0,), std=(1,))))
    assert [prediction.error is None for prediction in found] == [False] * 3 + [True] * 3
    assert found[0].error == f"{paths[0]}: the network's outputs are infinite or not numbers"
