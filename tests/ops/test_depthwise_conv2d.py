import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from replknet.ops import depthwise_conv2d
from replknet.ops._problem import in_format_of, is_channels_last, is_cnhw

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# N, C, H, W, Kh, Kw: 1x1 maps, kernels larger than the map, primes, odd channel counts, wide and narrow maps, groups of
# eight channels.
CASES = [
    (1, 1, 1, 1, 1, 1),
    (3, 5, 1, 1, 7, 7),
    (1, 7, 5, 3, 31, 31),
    (2, 3, 1, 17, 5, 51),
    (2, 3, 17, 1, 51, 5),
    (1, 2, 3, 193, 3, 13),
    (1, 1, 193, 5, 63, 1),
    (2, 499, 7, 7, 5, 3),
    (5, 16, 14, 14, 27, 27),
    (1, 8, 56, 56, 31, 31),
    (17, 2, 11, 13, 1, 9),
    (2, 1, 23, 19, 13, 13),
    (3, 64, 7, 7, 13, 13),
    (33, 3, 9, 11, 7, 7),
    (3, 16, 14, 14, 7, 7),
    (2, 24, 33, 70, 7, 7),
    (1, 8, 50, 50, 5, 5),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64_oracle(case, dtype, channels_last, device, oracle):
    inputs = oracle.make_inputs(*case, dtype, device, channels_last=channels_last)
    got = oracle.check(depthwise_conv2d, *inputs)
    assert is_channels_last(got["y"]) == is_channels_last(inputs[0])
    assert is_channels_last(got["dx"]) == is_channels_last(inputs[0])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if min(case[:2]) > 1], ids=str)
def test_cnhw_runs_as_it_is_and_matches(case, dtype, device, oracle):
    x, w, b, g = oracle.make_inputs(*case, dtype, device)
    like = torch.empty(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)
    inputs = in_format_of(x, like), w, b, in_format_of(g, like)
    got = oracle.check(depthwise_conv2d, *inputs)
    assert is_cnhw(got["y"]) == is_cnhw(got["dx"]) == is_cnhw(inputs[0])


@pytest.mark.parametrize("backend", ["rearranged", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [(2, 5, 9, 12, 7, 13), (3, 4, 2, 3, 9, 9)], ids=str)
def test_backends_asked_for_by_name_match(case, dtype, backend, device, oracle):
    # torch accumulates the gradients of half precision as it likes: one more rounding than ours.
    looser = 4 * oracle.tolerance[dtype] if backend == "torch" else None
    oracle.check(
        lambda x, w, b: depthwise_conv2d(x, w, b, backend=backend),
        *oracle.make_inputs(*case, dtype, device),
        tolerance=looser,
    )


# Half of them small: kernels of up to 11, and channels by eights, have CUDA kernels of their own.
odd = st.one_of(st.integers(0, 5), st.integers(0, 31)).map(lambda half: 2 * half + 1)
channels = st.one_of(st.sampled_from([8, 16, 24]), st.integers(1, 19))


@st.composite
def problems(draw):
    kernel = draw(odd), draw(odd)
    size = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    n, c = draw(st.integers(1, 4)), draw(channels)
    work = n * c * size[0] * size[1] * kernel[0] * kernel[1]
    if work > 4_000_000:
        n, c, size = 1, max(1, c * 4_000_000 // work), (min(size[0], 24), min(size[1], 24))
    return n, c, *size, *kernel


# In parts, so that several processes can share what takes long on a GPU: every problem has kernels to compile.
@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_problems_match_the_oracle(dtype, channels_last, part, device, oracle):
    @seed(part)
    @settings(max_examples=50, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(problem=problems(), bias=st.booleans(), relu=st.booleans(), number=st.integers(0, 99))
    def match(problem, bias, relu, number):
        activation = "relu" if relu else None
        inputs = oracle.make_inputs(*problem, dtype, device, channels_last=channels_last, bias=bias, seed=number)
        oracle.check(lambda x, w, b: depthwise_conv2d(x, w, b, activation=activation), *inputs, activation=activation)

    match()


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problem=problems(), channels_last=st.booleans(), bias=st.booleans(), seed=st.integers(100, 199))
def test_random_problems_match_the_oracle_in_float32(problem, channels_last, bias, seed, device, oracle):
    inputs = oracle.make_inputs(*problem, torch.float32, device, channels_last=channels_last, bias=bias, seed=seed)
    oracle.check(depthwise_conv2d, *inputs)


@pytest.mark.parametrize("view", ["slice", "expand", "transpose", "step", "narrow"])
def test_non_contiguous_input(view, device, oracle):
    base = oracle.make_inputs(4, 12, 10, 10, 5, 5, torch.float32, device)[0]
    x = {
        "slice": base[:, 3:9],
        "expand": base[:1, :6].expand(4, 6, 10, 10),
        "transpose": base[:, :6].transpose(2, 3),
        "step": base[::2, ::2, ::2],
        "narrow": base[:, :6, :, 2:7],
    }[view]
    _, w, b, _ = oracle.make_inputs(1, x.shape[1], 1, 1, 7, 3, torch.float32, device, seed=1)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(device)
    got = oracle.check(depthwise_conv2d, x, w, b, g)
    assert got["y"].is_contiguous()


def test_non_contiguous_weight_bias_and_gradient(device, oracle):
    x, w, b, g = oracle.make_inputs(2, 6, 9, 8, 7, 5, torch.float32, device)
    w = torch.stack([w, w], -1)[..., 0]
    b = torch.stack([b, b], -1)[..., 0]
    g = g.contiguous(memory_format=torch.channels_last)
    assert not w.is_contiguous()
    oracle.check(depthwise_conv2d, x, w, b, g)
    oracle.check(depthwise_conv2d, x, w, b, g[:1, :1].expand_as(x))


def test_no_images(device):
    x = torch.empty(0, 5, 8, 8, device=device, requires_grad=True)
    w = torch.randn(5, 1, 7, 7, device=device, requires_grad=True)
    b = torch.randn(5, device=device, requires_grad=True)
    y = depthwise_conv2d(x, w, b)
    assert y.shape == (0, 5, 8, 8)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert w.grad.eq(0).all()
    assert b.grad.eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relu_is_the_activation_of_the_plain_result(dtype, device, oracle):
    x, w, b, g = oracle.make_inputs(2, 6, 12, 10, 9, 7, dtype, device)
    y = depthwise_conv2d(x, w, b, activation="relu")
    assert (y >= 0).all()
    assert (y == 0).any()
    oracle.check(lambda x, w, b: depthwise_conv2d(x, w, b, activation="relu"), x, w, b, g, activation="relu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_two_runs_give_the_same_bits(dtype, channels_last, device, oracle):
    inputs = oracle.make_inputs(8, 24, 28, 28, 13, 13, dtype, device, channels_last=channels_last)
    first, second = (oracle.value_and_grads(depthwise_conv2d, *inputs) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_follows_the_active_dtype(dtype, device, oracle):
    x, w, b, _ = oracle.make_inputs(2, 4, 9, 9, 5, 5, torch.float32, device)
    w.requires_grad_()
    with torch.autocast(device.type, dtype=dtype):
        y = depthwise_conv2d(x, w, b)
    assert y.dtype == dtype
    y.sum().backward()
    assert w.grad.dtype == torch.float32
    assert torch.equal(y, depthwise_conv2d(x.to(dtype), w.to(dtype), b.to(dtype)))
    with torch.autocast(device.type, dtype=dtype):
        assert depthwise_conv2d(x.double(), w.double(), b.double()).dtype == torch.float64
        with torch.autocast(device.type, enabled=False):
            assert depthwise_conv2d(x, w, b).dtype == torch.float32


def test_mixed_dtypes_under_autocast(device, oracle):
    x, w, b, _ = oracle.make_inputs(2, 4, 9, 9, 5, 5, torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert depthwise_conv2d(x.bfloat16(), w, b).dtype == torch.bfloat16


def _call(**changed):
    given = {"x": torch.zeros(2, 4, 8, 8), "weight": torch.zeros(4, 1, 3, 3), "bias": None} | changed
    return depthwise_conv2d(given.pop("x"), given.pop("weight"), given.pop("bias"), **given)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"x": torch.zeros(4, 8, 8)}, r"\[N, C, H, W\], given \[4, 8, 8\]"),
        ({"weight": torch.zeros(4, 3, 3)}, r"\[C, 1, Kh, Kw\] .* C = 4, given \[4, 3, 3\]"),
        ({"weight": torch.zeros(5, 1, 3, 3)}, r"C = 4, given \[5, 1, 3, 3\]"),
        ({"weight": torch.zeros(4, 2, 3, 3)}, r"given \[4, 2, 3, 3\]"),
        ({"weight": torch.zeros(4, 1, 4, 3)}, r"4x3 is even"),
        ({"weight": torch.zeros(4, 1, 3, 0)}, r"3x0 is even"),
        ({"x": torch.zeros(2, 4, 0, 8)}, r"at least 1, given \[2, 4, 0, 8\]"),
        ({"bias": torch.zeros(5)}, r"C = 4, given \[5\]"),
        ({"bias": torch.zeros(4, 1)}, r"given \[4, 1\]"),
        ({"activation": "gelu"}, r"'gelu'"),
        ({"backend": "cudnn"}, r"'cudnn'"),
        ({"x": torch.zeros(2, 4, 8, 8).half()}, r"x is torch.float16, weight is torch.float32"),
        ({"bias": torch.zeros(4).half()}, r"bias is torch.float16"),
        ({"x": torch.zeros(2, 4, 8, 8).int(), "weight": torch.zeros(4, 1, 3, 3).int()}, r"given torch.int32"),
        ({"x": torch.zeros(2, 4, 8, 8, device="meta")}, r"x is on meta, weight is on cpu"),
    ],
)
def test_wrong_arguments_say_what_was_given(changed, said):
    with pytest.raises(ValueError, match=said):
        _call(**changed)


def test_a_backend_asked_for_by_name_raises_its_reason():
    with pytest.raises(NotImplementedError, match="tensors are on cpu"):
        _call(backend="cuda")
