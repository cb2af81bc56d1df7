import pytest
import torch

from replknet.ops import _cpu, _rearranged, _torch


@pytest.mark.parametrize("width", [9, 11, 13, 15, 17])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_width_around_the_thresholds(width, channels_last, oracle):
    x, w, b, g = oracle.make_inputs(2, 5, 9, 20, 3, width, torch.float64, "cpu", channels_last=channels_last)
    expected = _torch.forward(x, w, b, None)
    torch.testing.assert_close(_rearranged.forward(x, w, b, None), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(_rearranged.input_grad(g, w), _torch.input_grad(g, w), rtol=0, atol=1e-12)
    got, exact = (module.weight_grad(g, x, 3, width) for module in (_rearranged, _torch))
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 2), (7, 7)], ids=str)
def test_taps_that_reach_no_pixel_are_left_out(size, oracle):
    x, w, b, g = oracle.make_inputs(2, 3, *size, 21, 31, torch.float64, "cpu")
    torch.testing.assert_close(_rearranged.forward(x, w, b, None), _torch.forward(x, w, b, None), rtol=0, atol=1e-12)
    got, exact = (module.weight_grad(g, x, 21, 31) for module in (_rearranged, _torch))
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)
    rows, columns = (min(k, 2 * s - 1) for k, s in zip((21, 31), size, strict=True))
    assert got.ne(0).sum() == 3 * rows * columns


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once_on_a_cpu(dtype, oracle):
    x, w, b, g = oracle.make_inputs(3, 4, 12, 10, 7, 5, dtype, "cpu")
    wide = _rearranged.forward(x.float(), w.float(), b.float(), None)
    assert torch.equal(_rearranged.forward(x, w, b, None), wide.to(dtype))
    wide = _rearranged.weight_grad(g.float(), x.float(), 7, 5)
    assert torch.equal(_rearranged.weight_grad(g, x, 7, 5), wide.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cnhw"])
@pytest.mark.parametrize("name", ["avx512", "avx2"])
@pytest.mark.parametrize("kernel", [(1, 1), (5, 7), (9, 13), (15, 17)], ids=str)
def test_images_in_parts_match_the_oracle(kernel, name, layout, dtype, instructions, monkeypatch, oracle):
    instructions(name)
    x, w, b, g = oracle.make_inputs(5, 6, 12, 14, *kernel, dtype, "cpu", channels_last=layout == "channels_last")
    if layout == "cnhw":
        x, g = (value.transpose(0, 1).contiguous().transpose(0, 1) for value in (x, g))
    whole = _rearranged.forward(x, w, b, "relu"), _rearranged.input_grad(g, w), _rearranged.weight_grad(g, x, *kernel)
    image = 6 * 12 * 14 * 4
    monkeypatch.setattr(_cpu, "_PART", 2 * image // torch.get_num_threads())
    assert _cpu.parts_of(x.shape, torch.float32) == 3
    seen = []
    convolve = _rearranged._convolve_in
    monkeypatch.setattr(
        _rearranged, "_convolve_in", lambda *args, **kw: seen.append(len(args[1])) or convolve(*args, **kw)
    )
    parts = _rearranged.forward(x, w, b, "relu"), _rearranged.input_grad(g, w), _rearranged.weight_grad(g, x, *kernel)
    # float32 that comes in the format of the fastest kernel goes through whole.
    assert seen == [2, 2, 1] * 2 if dtype != torch.float32 else sum(seen) == 10
    for got, expected in zip(parts, whole, strict=True):
        assert got.dtype == dtype
        assert oracle.relative_error(got.double(), expected.double()) <= oracle.tolerance[dtype]


def test_a_part_is_no_less_than_an_image():
    assert _cpu.parts_of((1, 64, 4096, 4096), torch.float32) == 1
    assert _cpu.parts_of((3, 64, 4096, 4096), torch.float32) == 3
    assert _cpu.parts_of((64, 8, 7, 7), torch.float32) == 1
