"""Theoretical receptive fields against published sizes, hand arithmetic and what gradients reach."""

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import replknet
from replknet._errors import UsageError
from replknet.analysis.erf import effective_receptive_field
from replknet.analysis.erf_measures import support
from replknet.analysis.receptive_field import theoretical_receptive_field


# Araujo et al. 2019, table of receptive fields.
@pytest.mark.parametrize(
    ("name", "size", "stride"),
    [("mobilenetv1_100", 315, 32), ("inception_v3", 1311, 32), ("vgg16", 212, 32), ("densenet121", 2071, 32)],
)
def test_published_sizes(name, size, stride):
    with torch.device("meta"):
        model = timm.create_model(name)
    field = theoretical_receptive_field(model)
    assert field.size == (size, size)
    assert field.stride == (stride, stride)


@pytest.mark.parametrize("form", ["train", "merged", "fused"])
def test_replknet_by_hand(form):
    kernels, layers = (9, 7, 5, 3), (1, 2, 3, 1)
    model = replknet.models.RepLKNet(
        kernel_sizes=kernels, layers=layers, channels=(4, 4, 4, 4), small_kernel=3, num_classes=0, form=form
    )
    # Stem: 3x3 stride 2, 3x3, 1x1, 3x3 stride 2; transitions: 3x3 stride 2.
    size, jump = 1, 1
    for kernel, stride in ((3, 2), (3, 1), (3, 2)):
        size, jump = size + (kernel - 1) * jump, jump * stride
    for stage, (kernel, count) in enumerate(zip(kernels, layers, strict=True)):
        size += count * (kernel - 1) * jump
        if stage < 3:
            size, jump = size + 2 * jump, jump * 2
    field = theoretical_receptive_field(model)
    assert field.size == (size, size)
    assert field.stride == (32, 32)


def test_the_gradient_reaches_exactly_as_far():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, (3, 5), stride=(1, 2), padding=(1, 2)),
        nn.AvgPool2d(3, 2, 1),
        nn.Conv2d(4, 4, 3, dilation=2, padding=2),
    )
    field = theoretical_receptive_field(model, "output", image_size=(64, 64))
    result = effective_receptive_field(
        model, torch.randn(1, 3, 64, 64), layer="output", n=1, score="sum", variant="abs", dtype=torch.float64
    )
    assert field.size == support(result.matrix) == (13, 25)
    assert field.stride == (2, 4)


class Branches(nn.Module):
    """A long and a short way, added, joined, and seen through changes of layout."""

    def __init__(self):
        super().__init__()
        self.long = nn.Conv2d(4, 4, 11, padding=5)
        self.short = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.LayerNorm(12)

    def forward(self, x):
        x = torch.cat([self.long(x) + x, self.short(x), F.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1]], 1)
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).reshape(x.shape)


def test_branches_layouts_and_joins():
    field = theoretical_receptive_field(Branches(), "output", image_size=(20, 24), in_chans=4)
    assert field.size == (11, 11)


def test_dilated_and_transposed_and_resized():
    model = nn.Sequential(nn.Conv2d(3, 3, 3, stride=4, padding=1), nn.ConvTranspose2d(3, 3, 4, stride=2, padding=1))
    assert theoretical_receptive_field(model, "output").stride == (2, 2)
    model = nn.Sequential(nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear"))
    assert theoretical_receptive_field(model, "output").stride == (1, 1)


class Mixes(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.conv, self.tokens = how, nn.Conv2d(3, 4, 3, padding=1), nn.Linear(64, 64)

    def forward(self, x):
        x = self.conv(x)
        flat = x.flatten(2)
        return {
            "attention": lambda: F.scaled_dot_product_attention(flat, flat, flat).view_as(x),
            "squeeze": lambda: x * x.mean((2, 3), keepdim=True),
            "group norm": lambda: F.group_norm(x, 2),
            "tokens": lambda: self.tokens(flat).view_as(x),
            "softmax": lambda: flat.softmax(-1).view_as(x),
            "fft": lambda: torch.fft.ifft2(torch.fft.fft2(x)).real,
            "pooling": lambda: x + F.adaptive_avg_pool2d(x, 1),
        }[self.how]()


@pytest.mark.parametrize("how", ["attention", "squeeze", "group norm", "tokens", "softmax", "fft", "pooling"])
def test_what_mixes_all_positions_is_unbounded(how):
    assert not theoretical_receptive_field(Mixes(how), "output", image_size=(8, 8)).bounded
    assert theoretical_receptive_field(Mixes(how), "conv", image_size=(8, 8)).size == (3, 3)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mixer_s32_224", "swin_tiny_patch4_window7_224"])
def test_transformers_are_unbounded(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert not theoretical_receptive_field(model).bounded


def test_layers_and_torchvision():
    model = torchvision.models.get_model("resnet18")
    sizes = [theoretical_receptive_field(model, f"layer{index}").size[0] for index in (1, 2, 3, 4)]
    assert sizes == [43, 99, 211, 435]


def test_the_model_is_left_where_it_is():
    model = nn.Conv2d(3, 3, 3).train()
    theoretical_receptive_field(model, "output")
    assert model.weight.device.type == "cpu"
    assert model.training


def test_mistakes():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Flatten())
    model[0].spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(UsageError, match="never calls"):
        theoretical_receptive_field(model, "0.spare")
    with pytest.raises(UsageError, match="no spatial features"):
        theoretical_receptive_field(model, "output")
