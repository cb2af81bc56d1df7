import math

import numpy as np
import pytest

from replknet.tasks.schedules import WarmupCosine


def release_schedule(base, final, epochs, steps_per_epoch, warmup_epochs=0, start=0.0):
    """The release's array of values, written from its description: linspace, then half a cosine."""
    warmup = warmup_epochs * steps_per_epoch
    rest = epochs * steps_per_epoch - warmup
    cosine = [final + (base - final) * math.cos(math.pi * i / rest / 2) ** 2 for i in range(rest)]
    return np.concatenate([np.linspace(start, base, warmup), cosine])


@pytest.mark.parametrize(
    ("base", "final", "epochs", "steps", "warmup"),
    [
        (4e-3, 1e-6, 300, 625, 10),
        (4e-4, 3e-4, 30, 2502, 1),
        (4e-4, 1e-6, 30, 1251, 1),
        (0.05, 0.05, 3, 7, 0),
        (0.04, 0.4, 5, 3, 0),
        (1.0, 0.0, 2, 1, 1),
        (1.0, 0.0, 1, 1, 0),
    ],
    ids=str,
)
def test_equals_the_release(base, final, epochs, steps, warmup):
    schedule = WarmupCosine(base, final, epochs * steps, warmup * steps)
    expected = release_schedule(base, final, epochs, steps, warmup)
    got = np.array([schedule(step) for step in range(epochs * steps)])
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-18)


def test_corners():
    schedule = WarmupCosine(1.0, 0.1, 100, 10)
    assert schedule(0) == 0.0
    assert schedule(9) == schedule(10) == 1.0
    assert schedule(55) == pytest.approx(0.55)
    assert schedule(100) == schedule(1000) == 0.1


@pytest.mark.parametrize(("total", "warmup"), [(0, 0), (10, 10), (10, 11), (10, -1)])
def test_impossible_lengths_are_refused(total, warmup):
    with pytest.raises(ValueError, match="step"):
        WarmupCosine(1.0, 0.0, total, warmup)
