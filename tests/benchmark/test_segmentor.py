"""Timing a network that is built already: every combination, and no time for wrong outputs."""

import pytest
import timm
import torch
from torch import nn

import replknet  # noqa: F401 - registers the models
from replknet.benchmark.segmentor import TOLERANCE, measure_network


class Features(nn.Module):
    """The last feature map of replknet_nano."""

    def __init__(self):
        super().__init__()
        self.backbone = timm.create_model("replknet_nano", num_classes=0).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone.forward_features(x)


def rows(network: nn.Module):
    pictures = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    return list(
        measure_network(
            network,
            pictures,
            merged=(False, True),
            dtypes=(torch.float32, torch.bfloat16),
            channels_last=(False, True),
            seconds=0.02,
        )
    )


def test_every_combination_is_right_and_timed():
    torch.manual_seed(0)
    measured = rows(Features().eval())
    assert len(measured) == len({(m.merged, m.dtype, m.channels_last) for m in measured}) == 8
    assert all(m.times is not None and m.error <= TOLERANCE[m.dtype] for m in measured)
    assert [m.pictures_per_second for m in measured] == pytest.approx([2e6 / m.times.median for m in measured])


def test_wrong_outputs_get_no_time():
    class Liar(Features):
        """Right before it is merged, wrong after."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1.0 if self.backbone.form == "train" else 1.01)

    torch.manual_seed(0)
    measured = rows(Liar().eval())
    assert [m.times is None for m in measured if m.dtype == torch.float32] == [False, False, True, True]
    assert all(m.pictures_per_second is None for m in measured if m.times is None)
