"""The operator as a citizen of torch: opcheck, gradcheck, compile, export, vmap, checkpointing, graphs, streams."""

import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from replknet.layers import DepthwiseConv2d
from replknet.ops import depthwise_conv2d

OPS = torch.ops.replknet


def draw(*shape, dtype=torch.float32, device="cpu", seed=0, channels_last=False):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)
    return value.contiguous(memory_format=torch.channels_last) if channels_last else value


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 1, 1), (2, 4, 1, 1), (2, 1, 6, 5)], ids=str)
def test_opcheck(shape, channels_last, device):
    x = draw(*shape, device=device, channels_last=channels_last).requires_grad_()
    g = draw(*shape, device=device, channels_last=channels_last, seed=1).requires_grad_()
    w = draw(shape[1], 1, 3, 5, device=device, seed=2).requires_grad_()
    b = draw(shape[1], device=device, seed=3).requires_grad_()
    torch.library.opcheck(OPS.depthwise_conv2d.default, (x, w, b, "relu", "auto"))
    torch.library.opcheck(OPS.depthwise_conv2d.default, (x, w, None, None, "auto"))
    torch.library.opcheck(OPS.depthwise_conv2d_input_grad.default, (g, w, "auto"))
    torch.library.opcheck(OPS.depthwise_conv2d_weight_grad.default, (g, x, 3, 5, "auto"))


@pytest.mark.parametrize("backend", ["auto", "rearranged", "torch"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_first_and_second_derivatives(activation, backend, device):
    inputs = [
        draw(2, 2, 5, 4, dtype=torch.float64, device=device),
        draw(2, 1, 3, 5, dtype=torch.float64, device=device, seed=1),
        draw(2, dtype=torch.float64, device=device, seed=2),
    ]
    inputs = [value.requires_grad_() for value in inputs]

    def run(x, w, b):
        return depthwise_conv2d(x, w, b, activation=activation, backend=backend)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_only_the_gradients_that_are_wanted(wanted, device):
    inputs = {"x": draw(2, 3, 6, 6), "weight": draw(3, 1, 5, 5), "bias": draw(3)}
    inputs = {name: value.to(device).requires_grad_(name == wanted) for name, value in inputs.items()}
    depthwise_conv2d(inputs["x"], inputs["weight"], inputs["bias"]).sum().backward()
    assert [name for name, value in inputs.items() if value.grad is not None] == [wanted]


class Block(nn.Module):
    """A pointwise and a depthwise convolution, as they stand in every network."""

    def __init__(self):
        super().__init__()
        self.pointwise = nn.Conv2d(3, 4, 1)
        self.depthwise = DepthwiseConv2d(4, 4, (7, 5), padding=(3, 2), groups=4)

    def forward(self, x):
        return self.depthwise(self.pointwise(x)).relu().mean((2, 3))


def gradients(module, x):
    module.zero_grad()
    module(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in module.parameters()]


@pytest.fixture
def block(device):
    torch.manual_seed(0)
    return Block().to(device)


@pytest.mark.parametrize("dynamic", [False, True])
def test_traces_as_one_graph_in_inference_and_training(block, dynamic, device):
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seed, size in enumerate([(2, 3, 8, 9), (3, 3, 12, 11)]):
        for channels_last in (False, True):
            x = draw(*size, device=device, seed=seed, channels_last=channels_last)
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), block(x))
            torch.testing.assert_close(gradients(compiled, x), gradients(block, x))


@pytest.mark.slow
def test_inductor_compiles_inference_and_training(block, device):
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    x = draw(2, 3, 8, 9, device=device, channels_last=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))
    torch.testing.assert_close(gradients(compiled, x), gradients(block, x))


def test_compiles_under_autocast(block, device):
    torch._dynamo.reset()
    x = draw(2, 3, 8, 9, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got, expected = torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("strict", [False, True])
def test_exports_as_a_plain_convolution(block, strict, device):
    x = draw(2, 3, 8, 9, device=device)
    program = torch.export.export(block, (x,), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.conv2d.default" in targets
    assert not any("replknet" in target for target in targets)
    torch.testing.assert_close(program.module()(x), block(x))


def test_exported_program_survives_a_file(block, device):
    x = draw(2, 3, 8, 9, device=device)
    file = io.BytesIO()
    torch.export.save(torch.export.export(block, (x,)), file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), block(x))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_jit_traces_as_a_plain_convolution(block, device):
    x = draw(2, 3, 8, 9, device=device)
    traced = torch.jit.trace(block, x)
    assert "replknet::" not in str(traced.inlined_graph)
    other = draw(1, 3, 12, 10, device=device)
    torch.testing.assert_close(traced(other), block(other))


def test_fx_traces_the_layer_as_one_call(block, device):
    traced = torch.fx.symbolic_trace(block)
    x = draw(2, 3, 8, 9, device=device)
    torch.testing.assert_close(traced(x), block(x))


@pytest.mark.parametrize(
    ("x_dim", "w_dim", "b_dim"), [(0, None, None), (None, 0, None), (0, 0, 0), (1, 2, None), (0, None, 1)]
)
def test_vmap(x_dim, w_dim, b_dim, device):
    shapes = {"x": [2, 3, 6, 7], "w": [3, 1, 5, 3], "b": [3]}
    dims = {"x": x_dim, "w": w_dim, "b": b_dim}
    for name, dim in dims.items():
        if dim is not None:
            shapes[name].insert(dim, 4)
    values = [draw(*shape, device=device, seed=seed) for seed, shape in enumerate(shapes.values())]
    got = vmap(depthwise_conv2d, in_dims=tuple(dims.values()))(*values)
    each = [
        depthwise_conv2d(*(v if d is None else v.select(d, i) for v, d in zip(values, dims.values(), strict=True)))
        for i in range(4)
    ]
    # On a GPU another batch size means another order of summation.
    torch.testing.assert_close(got, torch.stack(each), rtol=1e-5, atol=1e-5)


def test_per_sample_gradients(device):
    xs, w = draw(4, 3, 6, 7, device=device), draw(3, 1, 5, 3, device=device, seed=1)

    def loss(w, x):
        return depthwise_conv2d(x.unsqueeze(0), w, activation="relu").square().sum()

    got = vmap(grad(loss), in_dims=(None, 0))(w, xs)
    torch.testing.assert_close(got, torch.stack([grad(loss)(w, x) for x in xs]))
    hessian_diagonal = grad(lambda w: grad(loss)(w, xs[0]).square().sum())(w)
    assert hessian_diagonal.isfinite().all()


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_forward_mode_says_that_it_is_missing():
    x = draw(1, 2, 4, 4)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: depthwise_conv2d(x, draw(2, 1, 3, 3)), (x,), (x,))


def test_checkpointing(block, device):
    x = draw(2, 3, 8, 9, device=device)
    expected = gradients(block, x)
    block.zero_grad()
    checkpoint(block, x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in block.parameters()], expected)


def test_flops_are_two_a_tap(device):
    x = draw(2, 3, 8, 9, device=device, seed=0).requires_grad_()
    w = draw(3, 1, 5, 7, device=device, seed=1).requires_grad_()

    with FlopCounterMode(display=False) as counter:
        OPS.depthwise_conv2d(x, w, None, None, "auto").sum().backward()
    assert counter.get_total_flops() == 3 * 2 * x.numel() * 35


def test_runs_on_meta_tensors():
    y = depthwise_conv2d(torch.empty(2, 3, 8, 8, device="meta"), torch.empty(3, 1, 5, 5, device="meta"))
    assert y.shape == (2, 3, 8, 8)


def test_backward_inside_autocast_keeps_the_dtype(device):
    x = draw(2, 3, 6, 6, device=device).requires_grad_()
    w = draw(3, 1, 5, 5, device=device, seed=1).requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        depthwise_conv2d(x, w).float().sum().backward()
    assert x.grad.dtype == w.grad.dtype == torch.float32


@pytest.mark.gpu
def test_cuda_graph_replays_on_new_data(cuda):
    x, w = draw(4, 8, 14, 14, dtype=torch.float16, device=cuda), draw(8, 1, 13, 13, dtype=torch.float16, device=cuda)
    depthwise_conv2d(x, w)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = depthwise_conv2d(x, w)
    x.copy_(draw(4, 8, 14, 14, dtype=torch.float16, device=cuda, seed=5))
    y.fill_(float("nan"))
    graph.replay()
    torch.testing.assert_close(y, depthwise_conv2d(x, w), rtol=0, atol=0)


@pytest.mark.gpu
def test_current_stream_is_respected(cuda):
    x, w = draw(8, 64, 56, 56, device=cuda, dtype=torch.float16), draw(64, 1, 31, 31, device=cuda, dtype=torch.float16)
    expected = depthwise_conv2d(x, w)
    torch.cuda.synchronize()
    late = torch.zeros_like(x)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        y = depthwise_conv2d(late, w)
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_thread_that_has_no_context_yet(cuda, channels_last):
    """Such as autograd's, when a backward pass begins with the operator."""
    from cuda.bindings import driver

    x = draw(4, 16, 20, 20, device=cuda, dtype=torch.float16, channels_last=channels_last)
    w = draw(16, 1, 9, 9, device=cuda, dtype=torch.float16, seed=1)
    expected = depthwise_conv2d(x, w)
    torch.cuda.synchronize()

    def first_call():
        driver.cuCtxSetCurrent(driver.CUcontext(0))
        return depthwise_conv2d(x, w)

    with ThreadPoolExecutor(1) as pool:
        y = pool.submit(first_call).result()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.gpu
def test_every_device_of_the_process(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA GPUs, there is {torch.cuda.device_count()}")
    for index in range(torch.cuda.device_count()):
        x, w = draw(2, 4, 9, 9, device=f"cuda:{index}"), draw(4, 1, 5, 5, device=f"cuda:{index}", seed=1)
        torch.testing.assert_close(depthwise_conv2d(x, w).cpu(), depthwise_conv2d(x.cpu(), w.cpu()), rtol=0, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
def test_more_than_two_to_the_31_elements(cuda, channels_last):
    free, _ = torch.cuda.mem_get_info()
    if free < 30 * 2**30:
        pytest.skip(f"needs 30 GiB of free GPU memory, there are {free >> 30}")
    n, c, size, k = 2, 1024, 1056, 5
    x = torch.zeros(n, c, size, size, dtype=torch.float16, device=cuda)
    assert x.numel() > 2**31
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    w = draw(c, 1, k, k, device=cuda, dtype=torch.float16)
    corner = draw(1, 8, 32, 32, device=cuda, dtype=torch.float16)
    x[-1:, -8:, -32:, -32:] = corner
    y = depthwise_conv2d(x, w)[-1:, -8:, -30:, -30:]
    expected = depthwise_conv2d(torch.nn.functional.pad(corner, (8, 0, 8, 0)), w[-8:])[:, :, -30:, -30:]
    torch.testing.assert_close(y, expected, rtol=0, atol=4e-3 * expected.abs().max().item())


@pytest.fixture
def float32_precision():
    """Sets the precision of float32 convolutions, and puts it back."""
    before = torch.backends.cudnn.conv.fp32_precision

    def set_to(precision: str) -> None:
        torch.backends.cudnn.conv.fp32_precision = precision

    yield set_to
    set_to(before)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "bound"), [("ieee", 1e-5), ("tf32", 2e-3)])
def test_float32_is_true_float32_unless_tf32_is_allowed(cuda, oracle, float32_precision, precision, bound):
    float32_precision(precision)
    oracle.check(depthwise_conv2d, *oracle.make_inputs(4, 8, 28, 28, 13, 13, torch.float32, cuda), tolerance=bound)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_float32_sums_of_very_many_terms_do_not_drift(cuda, oracle, float32_precision, channels_last):
    """Tensor cores cut instead of rounding: a sum of 200,000 terms left to them is off by 1e-4."""
    float32_precision("ieee")
    inputs = oracle.make_inputs(64, 32, 56, 56, 31, 31, torch.float32, cuda, channels_last=channels_last)
    oracle.check(depthwise_conv2d, *inputs, tolerance=1e-5)
