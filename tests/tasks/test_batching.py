import pytest

from replknet._errors import UsageError
from replknet.tasks.batching import BatchPlan, plan_batch


@pytest.mark.parametrize(
    ("batch", "devices", "limit", "per_device", "accumulation"),
    [
        # The release's commands: one machine of 8 with update_freq 4, and 32 GPUs.
        (2048, 8, 64, 64, 4),
        (2048, 32, 64, 64, 1),
        (2048, 1, 64, 64, 32),
        (2048, 8, None, 256, 1),
        (512, 16, 32, 32, 1),
        (96, 1, 64, 48, 2),
        (7, 7, None, 1, 1),
        (10, 2, 3, 1, 5),
    ],
)
def test_shares(batch, devices, limit, per_device, accumulation):
    assert plan_batch(batch, devices, max_per_device=limit) == BatchPlan(batch, devices, per_device, accumulation)


@pytest.mark.parametrize("batch", range(1, 40))
@pytest.mark.parametrize("devices", [1, 2, 3, 5])
@pytest.mark.parametrize("even", [False, True])
def test_the_product_is_the_global_batch_or_the_values_offered_fit(batch, devices, even):
    try:
        plan = plan_batch(batch, devices, max_per_device=6, even=even)
    except UsageError as error:
        offered = [int(word) for word in str(error).partition("--global_batch to ")[2].split(",")[0].split(" or ")]
        assert offered
        for value in offered:
            plan_batch(value, devices, max_per_device=6, even=even)
    else:
        assert plan.per_device * plan.accumulation * plan.devices == batch
        assert plan.per_device <= 6
        assert not (even and plan.per_device % 2)


def test_error_names_batches_and_devices_that_fit():
    with pytest.raises(UsageError, match="2046 or 2049, or run on 1 or 2 or 4 devices"):
        plan_batch(2048, 3)
    with pytest.raises(UsageError, match="even number"):
        plan_batch(7, 1, even=True)
    with pytest.raises(UsageError, match="at least 2"):
        plan_batch(8, 1, max_per_device=1, even=True)
    with pytest.raises(UsageError, match="at least 1"):
        plan_batch(0, 1)


def test_an_epoch_of_less_than_a_batch_is_refused():
    with pytest.raises(UsageError, match=r"63 images.*--global_batch to 63"):
        plan_batch(64, 1).steps_per_epoch(63)
    assert plan_batch(64, 1).steps_per_epoch(1281167) == 20018
