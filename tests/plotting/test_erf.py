"""Figures of effective receptive fields: files that are whole and what they show."""

import numpy as np
import pytest
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle
from PIL import Image

from replknet._errors import UsageError
from replknet.analysis.erf import ErfResult
from replknet.analysis.erf_measures import area_ratios
from replknet.plotting import erf as figures


@pytest.fixture
def matrix():
    y, x = np.mgrid[:96, :128]
    return 7 * np.exp(-((y - 48) ** 2 + (x - 64) ** 2) / 400)


def image_of(figure):
    return figure.axes[0].images[0]


def squares(figure):
    patches = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle) and not patch.get_fill()]
    return {patch.get_width() for patch in patches}


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_formats(matrix, tmp_path, suffix):
    path = figures.save(figures.heatmap(matrix, title="a network"), tmp_path / f"deep/erf.{suffix}")
    head = path.read_bytes()[:8]
    assert head.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])
    again = figures.save(figures.heatmap(matrix, title="a network"), tmp_path / f"again.{suffix}")
    assert path.read_bytes() == again.read_bytes()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_unknown_format_leaves_nothing(matrix, tmp_path):
    with pytest.raises(UsageError, match="png, svg, pdf"):
        figures.save(figures.heatmap(matrix), tmp_path / "erf.jpeg")
    assert list(tmp_path.iterdir()) == []


def test_heatmap_scales(matrix):
    linear = image_of(figures.heatmap(matrix, scale="linear"))
    assert np.allclose(linear.get_array(), matrix / 7)
    log = image_of(figures.heatmap(matrix, scale="log"))
    assert isinstance(log.norm, LogNorm)
    assert (log.norm.vmin, log.norm.vmax) == (1e-4, 1)
    release = image_of(figures.heatmap(matrix, scale="release"))
    assert np.allclose(release.get_array(), np.log10(matrix + 1) / np.log10(8))
    with pytest.raises(ValueError, match="scale is one of"):
        figures.heatmap(matrix, scale="sqrt")


def test_squares_are_the_area_ratios(matrix):
    figure = figures.heatmap(matrix, squares=(0.2, 0.5))
    assert squares(figure) == {area.side for area in area_ratios(matrix, (0.2, 0.5))}
    assert squares(figures.heatmap(matrix, squares=())) == set()


def test_scale_bar_is_as_long_as_it_says(matrix):
    figure = figures.heatmap(matrix)
    (bar,) = [patch for patch in figure.axes[0].patches if patch.get_fill()]
    (label,) = figure.axes[0].texts
    assert label.get_text() == f"{bar.get_width():g} px" == "20 px"


def test_results_and_signed_matrices_are_drawn(matrix):
    result = ErfResult(-matrix, "layer", "signed", "sum", 1, 0, (3, 4))
    assert np.allclose(image_of(figures.heatmap(result, scale="linear")).get_array(), matrix / 7)


def test_grid_shares_one_scale_and_names_its_panels(matrix):
    figure = figures.grid({name: matrix * scale for name, scale in {"a": 1, "b": 50, "c": 2, "d": 1, "e": 1}.items()})
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == list("abcde")
    assert len({id(axes.images[0].norm) for axes in panels}) == 1
    assert np.allclose(panels[0].images[0].get_array(), panels[1].images[0].get_array())


def test_radial_profiles(matrix):
    figure = figures.radial_profiles({"narrow": matrix**2, "wide": matrix})
    means, masses = figure.axes
    assert [line.get_label() for line in means.lines] == ["narrow", "wide"]
    assert means.get_yscale() == "log"
    assert all(line.get_ydata()[-1] == 1.0 for line in masses.lines[:2])


def test_overlay_is_bright_where_the_field_is(matrix):
    picture = np.full((96, 128, 3), (200, 100, 50), dtype=np.uint8)
    shown = image_of(figures.overlay(matrix, picture)).get_array()
    assert np.allclose(shown[48, 64], np.array([200, 100, 50]) / 255, atol=0.02)
    assert shown[0, 0].max() < 0.15
    assert np.ptp(shown[0, 0]) < 0.05


def test_sizes_of_one_pixel_and_up(tmp_path):
    for shape in ((1, 1), (2, 3), (7, 5), (40, 20)):
        matrix = np.arange(1.0, 1 + np.prod(shape)).reshape(shape)
        path = figures.save(figures.heatmap(matrix), tmp_path / "small.png", dpi=40)
        with Image.open(path) as image:
            image.load()


@pytest.mark.parametrize("bad", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.ones(4)])
def test_nothing_to_draw(bad):
    with pytest.raises(ValueError, match=r"\[H, W\]"):
        figures.heatmap(bad)
    with pytest.raises(ValueError, match="at least one"):
        figures.grid({})
    with pytest.raises(ValueError, match="at least one"):
        figures.radial_profiles({})


def test_overlay_needs_the_matrixs_size(matrix):
    with pytest.raises(ValueError, match=r"\(96, 128\).*\(96, 96, 3\)"):
        figures.overlay(matrix, np.zeros((96, 96, 3)))
