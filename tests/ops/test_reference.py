import pytest
import torch

from replknet.ops import depthwise_conv2d_fft, depthwise_conv2d_reference


def draw(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def test_one_tap_moves_the_image():
    x = torch.arange(12.0).view(1, 1, 3, 4)
    w = torch.zeros(1, 1, 3, 3)
    w[0, 0, 0, 2] = 1
    moved = torch.tensor([[0, 0, 0, 0], [1, 2, 3, 0], [5, 6, 7, 0]]).float()
    torch.testing.assert_close(depthwise_conv2d_reference(x, w)[0, 0], moved, rtol=0, atol=0)


@pytest.mark.parametrize("kernel", [(1, 1), (5, 9), (9, 3), (31, 31)], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (6, 7), (13, 4)], ids=str)
def test_both_are_torchs_convolution_in_float64(kernel, size):
    x, w, b = draw((2, 3, *size), (3, 1, *kernel), (3,))
    expected = torch.nn.functional.conv2d(x, w, b, padding=(kernel[0] // 2, kernel[1] // 2), groups=3)
    torch.testing.assert_close(depthwise_conv2d_reference(x, w, b), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(depthwise_conv2d_reference(x, w, b, "relu"), expected.relu(), rtol=0, atol=1e-12)
    torch.testing.assert_close(depthwise_conv2d_fft(x, w, b), expected, rtol=0, atol=1e-12)


def test_fft_has_the_gradients_of_the_definition():
    inputs = [value.requires_grad_() for value in draw((2, 3, 6, 7), (3, 1, 5, 9), (3,))]
    (g,) = draw((2, 3, 6, 7), seed=1)
    expected = torch.autograd.grad(depthwise_conv2d_reference(*inputs), inputs, g)
    for got, exact in zip(torch.autograd.grad(depthwise_conv2d_fft(*inputs), inputs, g), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)
