"""Numbers that describe an effective receptive field: area ratios, radial profile, Gaussian width.

Source of the area ratio: Ding et al. 2022, arXiv:2203.06717, sec. 4.1, and the official release's `erf/` scripts.
The Gaussian: Luo et al. 2016, arXiv:1701.04128.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)


@dataclass(frozen=True)
class Area:
    """The smallest centred square with more than `threshold` of the total.

    `side` is in pixels and `ratio` is the share of the image's area; both None where no square inside the image holds
    enough.
    """

    threshold: float
    side: int | None
    ratio: float | None


@dataclass(frozen=True)
class RadialProfile:
    """Contribution by distance from the centre; the arrays have one entry for each whole pixel of distance.

    Attributes:
        radius: `[R]` distance in pixels.
        mean: `[R]` mean contribution of the ring's pixels.
        cumulative: `[R]` share of the total within that distance.
    """

    radius: np.ndarray = field(repr=False)
    mean: np.ndarray = field(repr=False)
    cumulative: np.ndarray = field(repr=False)

    def radius_of(self, share: float) -> int:
        """Smallest whole-pixel radius that holds `share` of the total."""
        return int(self.radius[np.searchsorted(self.cumulative, share - 1e-12)])


@dataclass(frozen=True)
class GaussianFit:
    """Least-squares fit of `height · exp(-(dy²/2σy² + dx²/2σx²)) + floor`; lengths in pixels.

    `r2` is the share of the matrix's variance that the fit explains: low values say "this is no Gaussian".
    """

    sigma_y: float
    sigma_x: float
    centre_y: float
    centre_x: float
    height: float
    floor: float
    r2: float

    @property
    def sigma(self) -> float:
        """Geometric mean of both widths."""
        return float(np.sqrt(self.sigma_y * self.sigma_x))


@dataclass(frozen=True)
class Measures:
    """Everything that is reported of one matrix.

    Attributes:
        raw, log: area ratios of the matrix itself, which do not depend on its scale, and of `log_matrix`, which do.
        radial: profile of the raw matrix.
        gaussian: fit to the raw matrix, None where there is nothing to fit.
        support: sides `(height, width)` in pixels of the box around everything that is not zero.
        centroid: `(y, x)` centre of mass in pixels; the analysis is centred at `(H // 2, W // 2)`.
    """

    raw: tuple[Area, ...]
    log: tuple[Area, ...]
    radial: RadialProfile = field(repr=False)
    gaussian: GaussianFit | None
    support: tuple[int, int]
    centroid: tuple[float, float]


def measure(matrix: np.ndarray, thresholds: Sequence[float] = THRESHOLDS) -> Measures:
    """Describe a contribution matrix `[H, W]`; of a signed one the magnitude."""
    magnitude = _checked(matrix)
    return Measures(
        raw=area_ratios(magnitude, thresholds),
        log=area_ratios(log_matrix(magnitude), thresholds),
        radial=radial_profile(magnitude),
        gaussian=fit_gaussian(magnitude),
        support=support(magnitude),
        centroid=centroid(magnitude),
    )


def log_matrix(matrix: np.ndarray) -> np.ndarray:
    """`log10(x + 1)` divided by its maximum, as the release analyses and draws it. Depends on the matrix's scale."""
    logged = np.log10(_checked(matrix) + 1)
    return logged / logged.max()


def area_ratios(matrix: np.ndarray, thresholds: Sequence[float] = THRESHOLDS) -> tuple[Area, ...]:
    """Smallest centred odd squares that hold more than each threshold of the total.

    Squares grow around pixel `(H // 2, W // 2)` from side 3, as the release's do, and stay inside the image.

    Args:
        matrix: `[H, W]`; of a signed one the magnitude counts.
        thresholds: shares of the total, between 0 and 1.
    """
    magnitude = _checked(matrix)
    h, w = magnitude.shape
    for threshold in thresholds:
        if not 0 < threshold < 1:
            raise ValueError(f"a threshold is a share between 0 and 1; got {threshold}")
    cy, cx = h // 2, w // 2
    # Entry (y, x) is the sum over everything above and left of it, so a square costs four look-ups.
    integral = np.pad(magnitude.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    halves = np.arange(1, max(min(h, w) // 2, 1))
    top, bottom, left, right = cy - halves, cy + halves + 1, cx - halves, cx + halves + 1
    sums = integral[bottom, right] - integral[top, right] - integral[bottom, left] + integral[top, left]
    shares = sums / magnitude.sum()
    areas = []
    for threshold in thresholds:
        found = np.flatnonzero(shares > threshold)
        side = 2 * int(halves[found[0]]) + 1 if len(found) else None
        areas.append(Area(threshold, side, None if side is None else side * side / (h * w)))
    return tuple(areas)


def radial_profile(matrix: np.ndarray) -> RadialProfile:
    """Mean contribution and cumulative mass by distance from pixel `(H // 2, W // 2)`, in rings one pixel wide."""
    magnitude = _checked(matrix)
    h, w = magnitude.shape
    y, x = np.ogrid[:h, :w]
    ring = np.rint(np.hypot(y - h // 2, x - w // 2)).astype(np.int64).ravel()
    mass = np.bincount(ring, weights=magnitude.ravel())
    pixels = np.bincount(ring)
    running = np.cumsum(mass)
    # Divided by its own last entry, not by the matrix's sum, the share ends at exactly 1.
    return RadialProfile(np.arange(len(mass)), mass / np.maximum(pixels, 1), running / running[-1])


def support(matrix: np.ndarray) -> tuple[int, int]:
    """Height and width in pixels of the box around all entries that are not zero."""
    rows, columns = np.nonzero(_checked(matrix))
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


def centroid(matrix: np.ndarray) -> tuple[float, float]:
    """Centre of mass `(y, x)` in pixels."""
    magnitude = _checked(matrix)
    total = magnitude.sum()
    y = magnitude.sum(1) @ np.arange(magnitude.shape[0]) / total
    x = magnitude.sum(0) @ np.arange(magnitude.shape[1]) / total
    return float(y), float(x)


def fit_gaussian(matrix: np.ndarray, *, max_steps: int = 100) -> GaussianFit | None:
    """Fit an upright two-dimensional Gaussian with a floor by Levenberg-Marquardt; None for a constant matrix."""
    magnitude = _checked(matrix)
    scale = magnitude.max()
    data = magnitude / scale
    variance = np.sum((data - data.mean()) ** 2)
    if variance == 0:
        return None
    params = _first_guess(data)
    damping, error = 1e-3, np.inf
    for _ in range(max_steps):
        residual, jacobian = _gaussian_residual(data, params)
        if not np.isfinite(error):
            error = float(residual @ residual)
        normal, slope = jacobian @ jacobian.T, jacobian @ residual
        params, error, damping, moved = _step(data, params, normal, slope, error, damping)
        if moved < 1e-10:
            break
    cy, cx, log_sy, log_sx, height, floor = params
    return GaussianFit(
        sigma_y=float(np.exp(log_sy)),
        sigma_x=float(np.exp(log_sx)),
        centre_y=float(cy),
        centre_x=float(cx),
        height=float(height * scale),
        floor=float(floor * scale),
        r2=float(1 - error / variance),
    )


def _step(
    data: np.ndarray, params: np.ndarray, normal: np.ndarray, slope: np.ndarray, error: float, damping: float
) -> tuple[np.ndarray, float, float, float]:
    """One damped step that lowers the error: parameters, error, damping, and how far it moved (0: no better place)."""
    while damping < 1e12:
        damped = normal + damping * np.diag(np.diag(normal) + 1e-12)
        move = -np.linalg.solve(damped, slope)
        residual = _gaussian(data.shape, params + move)[0] - data.ravel()
        new_error = float(residual @ residual)
        if new_error < error:
            return params + move, new_error, max(damping / 10, 1e-12), float(np.abs(move).max())
        damping *= 10
    return params, error, damping, 0.0


def _first_guess(data: np.ndarray) -> np.ndarray:
    floor = float(np.median(data))
    above = np.maximum(data - floor - 0.1 * (1 - floor), 0)
    cy, cx = centroid(above)
    weight_y, weight_x = above.sum(1) / above.sum(), above.sum(0) / above.sum()
    sigma_y = np.sqrt(weight_y @ (np.arange(data.shape[0]) - cy) ** 2)
    sigma_x = np.sqrt(weight_x @ (np.arange(data.shape[1]) - cx) ** 2)
    return np.array([cy, cx, np.log(max(sigma_y, 0.5)), np.log(max(sigma_x, 0.5)), 1 - floor, floor])


def _gaussian(shape: tuple[int, ...], params: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Values `[H · W]`, the bump without height and floor `[H, W]`, and scaled distances `[H, 1]` and `[1, W]`."""
    cy, cx, log_sy, log_sx, height, floor = params
    dy = (np.arange(shape[0])[:, None] - cy) / np.exp(log_sy)
    dx = (np.arange(shape[1])[None, :] - cx) / np.exp(log_sx)
    bump = np.exp(-0.5 * dy**2) * np.exp(-0.5 * dx**2)
    return (height * bump + floor).ravel(), bump, dy, dx


def _gaussian_residual(data: np.ndarray, params: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Residuals `[H · W]` and their derivatives `[6, H · W]`."""
    values, bump, dy, dx = _gaussian(data.shape, params)
    scaled = params[4] * bump
    rows = (scaled * dy / np.exp(params[2]), scaled * dx / np.exp(params[3]), scaled * dy**2, scaled * dx**2, bump)
    jacobian = np.stack([*(row.ravel() for row in rows), np.ones(data.size)])
    return values - data.ravel(), jacobian


def _checked(matrix: np.ndarray) -> np.ndarray:
    array = np.asarray(matrix, dtype=np.float64)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"a contribution matrix is [H, W]; got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("the contribution matrix holds NaN or infinity")
    magnitude = np.abs(array)
    if not magnitude.any():
        raise ValueError("the contribution matrix is zero everywhere: no pixel moves the centre of the feature map")
    return magnitude
