"""`optimize`: the same answers and gradients, in every mode and format, for our networks and for others."""

import copy
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import replknet
from replknet.layers import DepthwiseConv2d, PointwiseConv2d, epilogue
from replknet.layers.activation_checkpoint import checkpointed
from replknet.layers.pointwise_conv2d import StridedPointwiseConv2d
from replknet.layers.recomputed_gelu import RecomputedGELU
from replknet.layers.unfolded_conv2d import UnfoldedConv2d, why_not_unfolded
from replknet.models.optimize import FORMATS, _batch_statistics, _count_at_once
from replknet.ops import is_cnhw

NETWORKS = ("replknet_nano", "test_convnext", "test_resnet", "test_vit")


def build(name: str, trained) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    network = trained(timm.create_model(name, num_classes=7)).double()
    size = network.pretrained_cfg["input_size"][-1] if "vit" in name else 64
    return network, torch.randn(3, 3, size, size, dtype=torch.float64)


def step(network: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    logits = network(x)
    logits.logsumexp(1).sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    return {"logits": logits.detach(), **gradients, **buffers}


@pytest.mark.parametrize("memory_format", [None, *FORMATS])
@pytest.mark.parametrize("name", NETWORKS)
def test_inference_gives_the_same_answers(name, memory_format, trained):
    network, x = build(name, trained)
    with torch.no_grad():
        want = network(x)
    assert replknet.optimize(network, memory_format=memory_format) is network
    got = network(x)
    assert not got.requires_grad
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("memory_format", [None, *FORMATS])
@pytest.mark.parametrize("name", NETWORKS)
def test_training_gives_the_same_gradients_and_statistics(name, memory_format, trained):
    network, x = build(name, trained)
    want = step(copy.deepcopy(network).train(), x)
    got = step(replknet.optimize(network, "training", memory_format=memory_format), x)
    assert got.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-7, atol=1e-7, msg=lambda text, k=key: f"{k}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_compiled(mode, memory_format, trained, device):
    torch._dynamo.reset()
    network, x = build("replknet_nano", trained)
    network, x = network.to(device), x.to(device)
    want = step(copy.deepcopy(network).train(mode == "training"), x)
    replknet.optimize(network, mode, memory_format=memory_format, compile=True)
    if mode == "inference":
        return torch.testing.assert_close(network(x), want["logits"], rtol=1e-9, atol=1e-9)
    got = step(network, x)
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-7, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # which torch captures to set up its memory
def test_cuda_graphs_follow_new_images_and_new_weights(trained, cuda):
    torch._dynamo.reset()
    network, x = build("replknet_nano", trained)
    network, x = network.to(cuda), x.to(cuda)
    plain = copy.deepcopy(network).train()
    replknet.optimize(network, "training", cuda_graph=True)
    for model in (plain, network):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for shift in range(5):
            optimizer.zero_grad()
            model(x + shift).square().mean().backward()
            optimizer.step()
    for (key, want), got in zip(plain.state_dict().items(), network.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7, msg=lambda text, k=key: f"{k}: {text}")
    torch._dynamo.reset()
    plain.eval()
    network = replknet.optimize(copy.deepcopy(plain), "inference", cuda_graph=True)
    with torch.no_grad():
        for shift in range(5):
            torch.testing.assert_close(network(x - shift), plain(x - shift), rtol=1e-7, atol=1e-7)


@pytest.mark.slow
def test_compiled_training_that_recomputes(trained, device):
    torch._dynamo.reset()
    network, x = build("replknet_nano", trained)
    network, x = network.to(device), x.to(device)
    want = step(copy.deepcopy(network).train(), x)
    network.set_grad_checkpointing(True)
    replknet.optimize(network, "training", compile=True, recompute=True)
    got = step(network, x)
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-7, atol=1e-7)


class Counting(nn.Module):
    """Scales by a count that it reads itself."""

    def __init__(self, returned: bool) -> None:
        super().__init__()
        self.returned = returned
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grown = self.count.add_(1)
        return x * (grown if self.returned else self.count)


def test_counts_of_batches_grow_in_one_call_and_those_that_are_read_by_themselves():
    norms = [nn.BatchNorm2d(3) for _ in range(4)]
    readers = [Counting(returned) for returned in (False, True)]
    network = nn.Sequential(*norms[:2], *readers, *norms[2:])
    calls = []

    def backend(graph, inputs):
        _count_at_once(graph.graph)
        graph.graph.lint()
        graph.recompile()
        calls.extend(node.target for node in graph.graph.nodes if "add_" in str(node.target))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(network, backend=backend, fullgraph=True)
    for batches in (1, 2, 3):
        x = torch.randn(2, 3, 4, 4)
        want = copy.deepcopy(network)(x)
        torch.testing.assert_close(compiled(x), want)
        assert [int(norm.num_batches_tracked) for norm in norms] == [batches] * 4
        assert [int(reader.count) for reader in readers] == [batches] * 2
    assert calls.count(torch._foreach_add_) == 1
    assert calls.count("add_") == 2


@pytest.mark.parametrize("mean", [0.0, 1e3, -1e5])
def test_statistics_as_sums(mean):
    torch.manual_seed(0)
    x = torch.randn(8, 5, 14, 14) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 1.0])[:, None, None] + mean
    x[:, 4] = torch.where(torch.rand(8, 14, 14) < 0.02, 1.0, 0.0)  # an activation that is seldom awake
    x[0, 4, 0, 0] = 1.0
    variance, average = _batch_statistics(x, [0, 2, 3], correction=0, keepdim=True)
    want_variance, want_average = torch.var_mean(x.double(), [0, 2, 3], correction=0, keepdim=True)
    torch.testing.assert_close(average.double(), want_average, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), want_variance, rtol=1e-4, atol=0)


def test_other_statistics_are_left_to_the_compiler():
    x = torch.randn(2, 3, 4, 4)
    assert _batch_statistics(x, [1], correction=0, keepdim=True) is NotImplemented
    assert _batch_statistics(x, [0, 2, 3], correction=1, keepdim=True) is NotImplemented
    assert _batch_statistics(x[0], [0, 1, 2], correction=0, keepdim=True) is NotImplemented


class Normed(nn.Sequential):
    """With a forward of its own, as networks have: torch 2.11 compiles a plain Sequential child by child."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        for module in self:
            x = module(x)
        return x


def test_compiled_batch_norms_take_their_statistics_as_sums(device, monkeypatch):
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = Normed(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()).to(device).double()
    x = torch.randn(4, 3, 8, 8, device=device, dtype=torch.float64) + 100
    want = step(copy.deepcopy(network), x)
    seen = []

    def watched(x, *arguments, **keywords):
        seen.append(x.shape)
        return _batch_statistics(x, *arguments, **keywords)

    monkeypatch.setattr(sys.modules[_batch_statistics.__module__], "_batch_statistics", watched)
    got = step(replknet.optimize(network, "training", compile=True), x)
    assert set(seen) == {(4, 8, 8, 8)}
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9)


class Choosing(nn.GELU):
    """A checkpoint that says itself what is kept: all."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's own name
        return checkpoint(F.gelu, input, use_reentrant=False, context_fn=keeping_all)  # type: ignore[return-value]


def keeping_all():
    return create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.MUST_SAVE)


class Block(nn.Module):
    def __init__(self, act: nn.Module):
        super().__init__()
        self.layers = Normed(nn.Conv2d(4, 64, 1), nn.BatchNorm2d(64), act, nn.Conv2d(64, 4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpointed(self.layers, x)


@pytest.mark.parametrize(("act", "times"), [(nn.GELU, 1), (RecomputedGELU, 1), (Choosing, 16)])
def test_a_checkpoint_in_a_checkpoint_keeps_nothing_more(act, times):
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = Normed(Block(act()), Block(act())).double()
    x = torch.randn(4, 4, 8, 8, dtype=torch.float64)
    want = step(copy.deepcopy(network), x)
    replknet.optimize(network, "training", compile=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        got = step(network, x)
    assert max(kept) == times * x.numel()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9)


def test_activations_are_taken_into_products(trained, monkeypatch):
    """As on CUDA, where the matrix library applies them."""
    monkeypatch.setattr(epilogue, "_has_epilogue", lambda *_: True)
    for name in ("replknet_nano", "test_vit"):
        network, x = build(name, trained)
        with torch.no_grad():
            want = network(x)
        replknet.optimize(network, compile=True)
        network._compiled_call_impl = None
        products = [
            m for m in network.modules() if getattr(m, "activation", None) and not isinstance(m, DepthwiseConv2d)
        ]
        assert len(products) >= 5
        assert not any(isinstance(m, nn.GELU) for m in network.modules())
        torch.testing.assert_close(network(x), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (4, 4, 0), ((3, 5), (2, 1), (0, 2))])
def test_a_first_convolution_is_a_matrix_product(kernel, stride, padding, device):
    conv = nn.Conv2d(3, 16, kernel, stride, padding).to(device).double()
    x = torch.randn(2, 3, 31, 40, device=device, dtype=torch.float64)
    want = conv(x)
    conv.__class__ = UnfoldedConv2d
    assert why_not_unfolded(conv) is None
    got = conv(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("name", "mode", "memory_format", "autocast"),
    [
        ("replknet_nano", "inference", "channels_last", False),
        ("replknet_nano", "inference", "cnhw", False),
        ("replknet_nano", "inference", "contiguous", False),
        ("replknet_nano", "training", "channels_last", True),
        ("replknet_nano", "training", "cnhw", True),
        ("test_convnext", "inference", "channels_last", True),
        ("test_convnext", "training", "contiguous", False),
    ],
)
def test_what_the_compiler_gets_to_see(name, mode, memory_format, autocast, trained):
    """One whole graph with this package's operator and with matrix products, not torch's own convolutions."""
    torch._dynamo.reset()
    network, x = build(name, trained)
    network, x = network.float(), x.float()
    replknet.optimize(network, mode, memory_format=memory_format, compile=True)
    network._compiled_call_impl = None
    convolutions = [module for module in network.modules() if isinstance(module, DepthwiseConv2d)]
    ours = sum(module.stride == (1, 1) for module in convolutions)
    graphs = []

    def keep(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    compiled = torch.compile(network, backend=keep, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        compiled(x)
    (calls,) = graphs
    assert sum("replknet.depthwise_conv2d" in call for call in calls) == ours > 0
    assert sum("mm" in call or "linear" in call for call in calls) > ours
    assert sum("conv2d of type" in call for call in calls) < 6


def test_what_becomes_of_the_layers(trained):
    network, x = build("replknet_nano", trained)
    replknet.optimize(network, memory_format="cnhw")
    assert network.form == "fused"
    assert all(type(conv) is not nn.Conv2d for conv in network.modules())
    kernels = [block.large_kernel.lkb_reparam for stage in network.stages for block in stage.blocks[::2]]
    assert {kernel.activation for kernel in kernels} == {"relu"}
    seen = []
    for module in network.modules():
        if isinstance(module, (DepthwiseConv2d, PointwiseConv2d)):
            module.register_forward_hook(lambda module, inputs, output: seen.append(is_cnhw(output)))
    network(x)
    assert len(seen) > 20
    assert all(seen)


def test_torchs_weight_gradient_that_leaves_its_memory_is_not_run():
    """Of 1x1 convolutions with strides in channels_last, on CPUs: RepVGG's and MobileOne's first layer is one."""
    network = nn.Sequential(nn.Conv2d(3, 8, 1, stride=2), nn.Conv2d(8, 4, 3, stride=2))
    replknet.optimize(network, "training", compile=False)
    assert [type(conv) for conv in network] == [StridedPointwiseConv2d, nn.Conv2d]
    network = replknet.optimize(nn.Sequential(nn.Conv2d(3, 8, 1, stride=2)), "inference")
    assert not isinstance(network[0], StridedPointwiseConv2d)


def test_state_dict_stays_as_it_was(trained):
    network, _ = build("replknet_nano", trained)
    before = network.state_dict()
    replknet.optimize(network, "training", memory_format="channels_last")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    copy.deepcopy(network).load_state_dict(before)


def test_a_second_call_changes_nothing(trained):
    network, x = build("replknet_nano", trained)
    first = replknet.optimize(network)(x)
    assert torch.equal(replknet.optimize(network)(x), first)


def test_half_precision(trained):
    network, x = build("replknet_nano", trained)
    want = network(x)
    got = replknet.optimize(network, dtype=torch.bfloat16)(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() < 0.1 * want.abs().max()


def test_patched_convolutions_are_left(trained):
    network, _ = build("test_resnet", trained)
    conv = next(m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1))
    conv.forward = lambda input: nn.Conv2d.forward(conv, input)  # noqa: A006
    replknet.optimize(network)
    assert type(conv) is nn.Conv2d


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"mode": "fast"}, ValueError, "mode must be one of 'inference', 'training', given 'fast'"),
        ({"memory_format": "nchw"}, ValueError, "memory_format must be one of .*'cnhw', given 'nchw'"),
        ({"dtype": torch.int8}, ValueError, "dtype must be a floating one"),
        ({"dtype": torch.float16, "mode": "training"}, ValueError, "under torch.autocast"),
        ({"cuda_graph": True}, ValueError, "needs a compiled model on CUDA"),
        ({"recompute": True}, ValueError, "is for compiled training"),
        ({"recompute": True, "mode": "training"}, ValueError, "is for compiled training"),
    ],
)
def test_impossible_requests(arguments, error, words):
    with pytest.raises(error, match=words):
        replknet.optimize(nn.Conv2d(2, 2, 1), **arguments)


def test_wrong_things_to_optimize():
    with pytest.raises(TypeError, match=r"takes an nn\.Module, given function"):
        replknet.optimize(step)
    with pytest.raises(TypeError, match="not compiled yet"):
        replknet.optimize(torch.compile(nn.Conv2d(2, 2, 1)))
    with pytest.raises(ValueError, match="several devices: cpu, meta"):
        replknet.optimize(nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1, device="meta")))
