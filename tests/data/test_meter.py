"""The meter against a clock that is turned by hand."""

from replknet.data import ThroughputMeter


def test_rates_and_shares():
    now = [0.0]
    meter = ThroughputMeter(clock=lambda: now[0])

    def slow_loader():
        for _ in range(4):
            now[0] += 3.0
            yield [0] * 10

    for _ in meter.iterate(slow_loader(), len):
        now[0] += 1.0
    result = meter.result()
    assert result.images == 40
    assert result.seconds == 16.0
    assert result.images_per_second == 2.5
    assert result.wait_share == 0.75


def test_nothing_happened():
    meter = ThroughputMeter(clock=lambda: 5.0)
    assert (meter.result().images_per_second, meter.result().wait_share) == (0.0, 0.0)
