"""Area ratios, profiles and fits against plain loops, closed forms and scipy."""

import numpy as np
import pytest
from scipy.optimize import curve_fit

from replknet.analysis.erf_measures import (
    area_ratios,
    centroid,
    fit_gaussian,
    log_matrix,
    measure,
    radial_profile,
    support,
)

THRESHOLDS = (0.05, 0.2, 0.3, 0.5, 0.9, 0.99)


def release_square(data, threshold):
    """The release's search, square by square."""
    h, w = data.shape
    for half in range(1, min(h, w) // 2):
        window = data[h // 2 - half : h // 2 + half + 1, w // 2 - half : w // 2 + half + 1]
        if window.sum() / data.sum() > threshold:
            side = 2 * half + 1
            return side, side / h * side / w
    return None, None


def blob(shape, centre, sigma, height=3.0, floor=0.2):
    y, x = np.mgrid[: shape[0], : shape[1]]
    far = (y - centre[0]) ** 2 / (2 * sigma[0] ** 2) + (x - centre[1]) ** 2 / (2 * sigma[1] ** 2)
    return height * np.exp(-far) + floor


@pytest.fixture
def random():
    return np.random.default_rng(0)


class TestAreaRatios:
    @pytest.mark.parametrize("shape", [(64, 64), (65, 65), (64, 97), (101, 40), (7, 7), (4, 4), (3, 9)])
    def test_equal_the_plain_search(self, random, shape):
        data = random.random(shape) ** 3 * blob(shape, (shape[0] / 2, shape[1] / 2), (shape[0] / 6, shape[1] / 5))
        for area in area_ratios(data, THRESHOLDS):
            side, ratio = release_square(data, area.threshold)
            assert area.side == side
            assert area.ratio == pytest.approx(ratio, rel=1e-12) if ratio else area.ratio is None

    def test_the_threshold_has_to_be_exceeded(self):
        data = np.zeros((21, 21))
        data[10, 10] = data[10, 14] = 1.0
        half, more = area_ratios(data, (0.5, 0.4999))
        assert (half.side, more.side) == (9, 3)

    def test_mass_outside_every_square_gives_none(self):
        data = np.zeros((20, 20))
        data[0, 0] = 1.0
        assert all(area.side is None and area.ratio is None for area in area_ratios(data))

    def test_raw_ratios_do_not_depend_on_scale_and_log_ratios_do(self, random):
        data = blob((80, 80), (40, 40), (9, 9), floor=0) * random.random((80, 80)) * 100
        assert area_ratios(data) == area_ratios(data * 1e-4)
        assert area_ratios(log_matrix(data)) != area_ratios(log_matrix(data * 1e-4))

    def test_signed_matrices_count_by_magnitude(self, random):
        data = random.standard_normal((40, 40))
        assert area_ratios(data) == area_ratios(np.abs(data))

    @pytest.mark.parametrize("threshold", [0, 1, 1.5, -0.1])
    def test_thresholds_are_shares(self, threshold):
        with pytest.raises(ValueError, match="between 0 and 1"):
            area_ratios(np.ones((9, 9)), (threshold,))


def test_log_matrix_is_the_releases():
    data = np.array([[0.0, 9.0], [99.0, 999.0]])
    assert np.allclose(log_matrix(data), [[0, 1 / 3], [2 / 3, 1]])


class TestRadialProfile:
    def test_equals_plain_loops(self, random):
        data = random.random((13, 18))
        profile = radial_profile(data)
        rings: dict[int, list[float]] = {}
        for y in range(13):
            for x in range(18):
                rings.setdefault(round(np.hypot(y - 6, x - 9)), []).append(data[y, x])
        for radius, values in rings.items():
            assert profile.mean[radius] == pytest.approx(np.mean(values))
        inside = [sum(sum(values) for r, values in rings.items() if r <= radius) for radius in profile.radius]
        assert np.allclose(profile.cumulative, np.array(inside) / data.sum())
        assert profile.cumulative[-1] == 1.0

    def test_radius_of_a_share(self):
        data = np.zeros((41, 41))
        data[20, 20], data[20, 27], data[8, 20] = 2.0, 1.0, 1.0
        profile = radial_profile(data)
        assert [profile.radius_of(share) for share in (0.5, 0.51, 0.75, 1.0)] == [0, 7, 7, 12]


class TestGaussian:
    @pytest.mark.parametrize("floor", [0.0, 0.4])
    def test_recovers_a_gaussian(self, floor):
        fit = fit_gaussian(blob((101, 121), (50.3, 62.8), (9, 14), floor=floor))
        assert fit is not None
        got = (fit.centre_y, fit.centre_x, fit.sigma_y, fit.sigma_x, fit.height, fit.floor)
        assert got == pytest.approx((50.3, 62.8, 9, 14, 3, floor), abs=1e-6)
        assert fit.sigma == pytest.approx(np.sqrt(9 * 14))
        assert fit.r2 == pytest.approx(1)

    def test_agrees_with_scipy_on_noise(self, random):
        data = blob((60, 50), (31, 22), (6, 8)) * random.gamma(4, 0.25, (60, 50))
        fit = fit_gaussian(data)
        y, x = np.mgrid[:60, :50]

        def model(_, cy, cx, sy, sx, height, floor):
            return (height * np.exp(-((y - cy) ** 2) / (2 * sy**2) - (x - cx) ** 2 / (2 * sx**2)) + floor).ravel()

        best, _ = curve_fit(model, None, data.ravel(), p0=(30, 25, 5, 5, 2, 0))
        assert fit is not None
        got = (fit.centre_y, fit.centre_x, fit.sigma_y, fit.sigma_x, fit.height, fit.floor)
        assert got == pytest.approx(best, rel=1e-4)

    def test_a_single_pixel_and_a_constant(self):
        point = np.zeros((31, 31))
        point[15, 15] = 1
        fit = fit_gaussian(point)
        assert fit is not None
        assert fit.sigma < 0.5
        assert fit_gaussian(np.full((9, 9), 2.0)) is None


def test_support_and_centroid(random):
    data = np.zeros((50, 60))
    data[10:21, 30:35] = random.random((11, 5)) + 0.1
    data[12:15, 31:33] = 0
    assert support(data) == (11, 5)
    y, x = np.mgrid[:50, :60]
    assert centroid(data) == pytest.approx(((y * data).sum() / data.sum(), (x * data).sum() / data.sum()))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.zeros((5, 5)), "zero everywhere"),
        (np.ones(5), r"\[H, W\]"),
        (np.ones((0, 3)), r"\[H, W\]"),
        (np.full((5, 5), np.nan), "NaN"),
    ],
)
def test_matrices_that_cannot_be_measured(matrix, message):
    with pytest.raises(ValueError, match=message):
        measure(matrix)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 2), (3, 3)])
def test_tiny_matrices_are_measured(shape):
    measures = measure(np.arange(1.0, 1 + np.prod(shape)).reshape(shape))
    assert measures.radial.cumulative[-1] == 1.0
