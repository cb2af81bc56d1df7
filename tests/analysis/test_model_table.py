import pytest

from replknet._errors import UsageError
from replknet.analysis.model_table import deployed_cost, model_table


@pytest.mark.parametrize(
    ("model", "size", "params", "gmacs"),
    [
        ("replknet_31b", 224, 79.527272, 15.35),
        ("replknet_31b", 384, 79.527272, 45.12),
        ("replknet_31l", 384, 172.165672, 95.99),
        ("replknet_xl", 320, 335.399656, 128.73),
    ],
)
def test_costs_are_the_published_ones(model, size, params, gmacs):
    got_params, got_gmacs = deployed_cost(model, (3, size, size), 1000)
    assert got_params == params
    assert got_gmacs == pytest.approx(gmacs, abs=0.005)


def test_words_are_searched_in_every_column():
    names = {row.name for row in model_table(["cityscapes"])}
    assert names == {"replknet_31b.in1k_upernet_cityscapes"}
    assert {row.method for row in model_table(["FCOS"])} == {"FCOS"}
    assert {row.name for row in model_table(["nano", "untrained"])} == {"replknet_nano"}


def test_patterns_are_of_the_name():
    assert [row.name for row in model_table(["replknet_13*"])] == ["replknet_13.in1k_120e"]


def test_rows_without_weights_have_no_files():
    (row,) = model_table(["replknet_nano"])
    assert (row.files, row.urls, row.scores, row.input_size) == ((), (), (), (3, 32, 32))


@pytest.mark.parametrize(("words", "task"), [(["nope"], None), (["fcos"], "segmentation"), (["*nope*"], None)])
def test_no_row_is_a_usage_error(words, task):
    with pytest.raises(UsageError, match="no RepLKNet matches"):
        model_table(words, task=task)
