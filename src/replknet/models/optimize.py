"""The one entry to speed: a model as it was built, made ready to run or to train as fast as this machine can."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import torch
import torch._functorch.config as functorch_config
from timm.layers.mlp import Mlp
from torch import Tensor, fx, nn

from replknet._host_memory import keep_freed_memory
from replknet.layers import ConvFFN, ConvNorm, DepthwiseConv2d, PointwiseConv2d, reparameterize
from replknet.layers.activated_linear import ActivatedLinear
from replknet.layers.cnhw_conv2d import CnhwConv2d
from replknet.layers.epilogue import Activated
from replknet.layers.packed_conv2d import PackedConv2d, why_not_packed
from replknet.layers.pointwise_conv2d import (
    StridedPointwiseConv2d,
    why_not_matrix_product,
    why_not_product_of_samples,
)
from replknet.layers.recomputed_gelu import RecomputedGELU
from replknet.layers.shifted_depthwise_conv2d import ShiftedDepthwiseConv2d, why_not_shifted
from replknet.layers.unfolded_conv2d import UnfoldedConv2d, why_not_unfolded
from replknet.models.accelerate import accelerate

Mode = Literal["inference", "training"]
Format = Literal["contiguous", "channels_last", "cnhw"]
MODES: tuple[Mode, ...] = get_args(Mode)
FORMATS: tuple[Format, ...] = get_args(Format)
Layer = TypeVar("Layer", bound=nn.Module)

log = logging.getLogger(__name__)


def optimize(
    model: nn.Module,
    mode: Mode = "inference",
    *,
    dtype: torch.dtype | None = None,
    memory_format: Format | None = None,
    compile: bool | None = None,  # noqa: A002 - torch's own name
    cuda_graph: bool = False,
    autotune: bool = False,
    recompute: bool = False,
) -> nn.Module:
    """Make a RepLKNet, or any other network, fast; in place.

    Both modes: depthwise convolutions run as `replknet.ops.depthwise_conv2d`, 1x1 convolutions as matrix products,
    one memory format goes through the whole network, and on CUDA the network is compiled by torch.compile. Outputs
    change by rounding only, but for GELU on CUDA in bfloat16, which takes its tanh form: off by up to 5e-4.

    - "inference": evaluation mode; small kernels merged and batch norms folded (`replknet.reparameterize`), ReLUs
      taken into the depthwise kernels; parameters ask for no gradient. On a CPU weights are also kept in oneDNN's
      layout, beside the parameters, and every activation runs in the kernel before it.
    - "training": training mode; parameters, state-dict keys and batch norms stay as they are. Mixed precision is
      autocast's affair, as always. Compiled for CUDA, outputs of GELU are computed again in backward instead of kept:
      a seventh less memory. On a CPU the process keeps the memory of freed tensors for the next step from then on.

    Call it after loading weights and moving the model to its device, and before wrapping it for distributed training.

    Args:
        model: any module; images `[N, C, H, W]` in.
        mode: "inference" or "training".
        dtype: of parameters and buffers, for inference; images must then come in it. None leaves it.
        memory_format: "contiguous", "channels_last", or "cnhw" (all images of a channel together: for networks of
            depthwise and 1x1 convolutions and batch norms, such as RepLKNet, compiled). None takes channels_last.
            Images may come in any.
        compile: compile with torch.compile; None does so on CUDA. Elsewhere it needs a C++ compiler.
        cuda_graph: compiled code also captures CUDA graphs, which removes the host's launch times; outputs are then
            overwritten by the next call, gradients too: those of several backward passes add up rightly only where
            every parameter has a `grad` (of zeros, say) before the first. Inputs of one shape only make sense.
        autotune: let the compiler time its choices of matrix products; the first call takes minutes.
        recompute: compiled training stores no norm's and no activation's output but computes it again in backward: a
            third less memory at some of the speed. The model's own `set_grad_checkpointing` goes further.

    Returns:
        `model` itself.

    Raises:
        TypeError: not a module, or one that torch.compile has wrapped already.
        ValueError: an unknown mode or format, a dtype that is not floating or is given for training, CUDA graphs
            without CUDA or without compilation, `recompute` for inference or without compilation.

    Example:
        >>> model = replknet.optimize(timm.create_model("replknet_nano"), "inference")
    """
    _check(model, mode, dtype, memory_format)
    device = _device_of(model)
    compiled = device.type == "cuda" if compile is None else compile
    if cuda_graph and not (compiled and device.type == "cuda"):
        raise ValueError(f"cuda_graph=True needs a compiled model on CUDA; got compile={compile}, {device}")
    if recompute and not (compiled and mode == "training"):
        raise ValueError(f"recompute=True is for compiled training; got mode={mode!r}, compile={compile}, {device}")
    chosen = memory_format or "channels_last"
    if mode == "inference":
        reparameterize(model.eval()).requires_grad_(False)
        model.to(dtype)
    else:
        model.train()
        if device.type == "cpu":
            keep_freed_memory()
    log.info("%s", accelerate(model))
    if compiled and device.type == "cuda":
        _convert(model, DepthwiseConv2d, ShiftedDepthwiseConv2d, lambda conv: why_not_shifted(conv) is None)
        if chosen == "channels_last":
            _convert(model, nn.Conv2d, UnfoldedConv2d, lambda conv: why_not_unfolded(conv) is None)
        if mode == "training":
            _convert(model, nn.GELU, RecomputedGELU, lambda act: True)
    _take_format(model, chosen)
    if mode == "training" and device.type == "cpu" and chosen == "channels_last":
        _convert(model, nn.Conv2d, StridedPointwiseConv2d, lambda conv: why_not_product_of_samples(conv) is None)
    if mode == "inference" and chosen == "channels_last":
        if device.type == "cpu" and not compiled:
            _pack(model)
        _absorb_activations(model)
    if compiled:
        options = _compiler_options(cuda_graph=cuda_graph, autotune=autotune)
        model.compile(dynamic=False, backend=functools.partial(_compile_graph, options=options, recompute=recompute))
    return model


def _compile_graph(graph: fx.GraphModule, inputs: list[Any], *, options: dict[str, Any], recompute: bool) -> Any:
    """TorchInductor, as a backend of torch.compile."""
    _count_at_once(graph.graph)
    _merge_checkpoints(graph)
    # The compiler is slow to import, and only asked for here.
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    decompositions = {**select_decomp_table(), torch.ops.aten.var_mean.correction: _batch_statistics}
    with functorch_config.patch(ban_recompute_materialized_backward=not recompute):
        return compile_fx(graph, inputs, config_patches=options, decompositions=decompositions)


def _batch_statistics(
    x: Tensor, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """Variance and mean `[1, C, 1, 1]` of x `[N, C, H, W]` for a batch norm, as two plain sums.

    The compiler's own way (Welford's) divides at every element and carries three numbers through both of its steps.
    Both sums are taken less one value of the channel, so that a mean that is large beside the deviation costs no
    digits. Other calls of `aten.var_mean` are NotImplemented, which leaves them to the compiler.
    """
    if x.dim() != 4 or dim != [0, 2, 3] or correction != 0 or not keepdim:
        return NotImplemented
    shift = x[:1, :, :1, :1]
    apart = x - shift
    mean = apart.mean(dim, keepdim=True)
    square = (apart * apart).mean(dim, keepdim=True)
    return (square - mean * mean).clamp_min(0), mean + shift


def _merge_checkpoints(graph: fx.GraphModule, *, inside: bool = False) -> None:
    """A checkpoint within a checkpoint becomes a part of it.

    The compiler keeps what goes from one checkpoint into another. `RecomputedGELU` in a block that is computed again as
    a whole would thus keep its input, the widest tensor of the block.
    """
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target is not torch.ops.higher_order.tag_activation_checkpoint:
            continue
        name = node.args[0].target
        body = graph.get_submodule(name)
        assert isinstance(body, fx.GraphModule)
        _merge_checkpoints(body, inside=True)
        if inside and "_checkpoint_context_fn" not in body.meta:  # which says itself what to keep
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(graph.graph.call_module(name, node.args[1:]))
            graph.graph.erase_node(node)
    graph.recompile()


def _count_at_once(graph: fx.Graph) -> None:
    """Every batch norm adds 1 to its own count of batches: one kernel for all of them instead of one each."""
    counts = [
        node
        for node in graph.nodes
        if node.op == "call_method" and node.target == "add_" and node.args[1:] == (1,) and not node.users
        if isinstance(node.args[0], fx.Node) and _is_count(node.args[0])
    ]
    if not counts:
        return
    with graph.inserting_before(counts[-1]):
        together = torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]
        graph.call_function(together, ([node.args[0] for node in counts], 1))
    for node in counts:
        graph.erase_node(node)


def _is_count(node: fx.Node) -> bool:
    """Whether the node is a scalar of whole numbers that nothing else reads."""
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and value.dim() == 0 and value.dtype == torch.long and len(node.users) == 1


def _check(model: nn.Module, mode: str, dtype: torch.dtype | None, memory_format: str | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize takes an nn.Module, given {type(model).__name__}")
    if isinstance(model, torch._dynamo.OptimizedModule) or model._compiled_call_impl is not None:
        raise TypeError("optimize takes a model that is not compiled yet: give it the original, it compiles itself")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, given {mode!r}")
    if memory_format not in (None, *FORMATS):
        raise ValueError(f"memory_format must be one of {', '.join(map(repr, FORMATS))}, given {memory_format!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating one such as torch.bfloat16, given {dtype}")
    if dtype is not None and mode == "training":
        raise ValueError(f"dtype={dtype} is for inference; train in float32 parameters under torch.autocast")


def _device_of(model: nn.Module) -> torch.device:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        raise ValueError(f"the model lies on several devices: {', '.join(sorted(map(str, devices)))}; move it to one")
    return devices.pop() if devices else torch.device("cpu")


def _take_format(model: nn.Module, memory_format: Format) -> None:
    _convert(model, nn.Conv2d, PointwiseConv2d, lambda conv: why_not_matrix_product(conv) is None)
    if memory_format == "cnhw":
        _convert(model, nn.Conv2d, CnhwConv2d, lambda conv: True)
        return
    layout = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    model.to(memory_format=layout)  # type: ignore[call-overload]


def _pack(model: nn.Module) -> None:
    """Give convolutions weights in oneDNN's layout."""
    for old in (nn.Conv2d, PointwiseConv2d, DepthwiseConv2d):
        _convert(model, old, PackedConv2d, lambda conv: why_not_packed(conv) is None)


def _absorb_activations(model: nn.Module) -> None:
    """Give convolutions without a norm the activations behind them."""
    for module in model.modules():
        if isinstance(module, ConvNorm) and isinstance(module.bn, nn.Identity):
            module.act = _absorbed(module.conv, module.act)
        elif isinstance(module, ConvFFN) and isinstance(module.pw1.bn, nn.Identity):
            module.nonlinear = _absorbed(module.pw1.conv, module.nonlinear)  # type: ignore[assignment]
        elif type(module) is Mlp and type(module.fc1) is nn.Linear and "forward" not in vars(module.fc1):
            module.fc1.__class__ = ActivatedLinear
            module.act = _absorbed(module.fc1, module.act)


def _absorbed(conv: nn.Module, act: nn.Module) -> nn.Module:
    return conv.absorb(act) if isinstance(conv, Activated) else act


def _convert(model: nn.Module, old: type[Layer], new: type[Layer], wanted: Callable[[Layer], bool]) -> None:
    """Give the same objects another class, as `accelerate` does; subclasses and patched ones are left."""
    for module in model.modules():
        plain = type(module) is old and not {"forward", "_conv_forward"} & vars(module).keys()
        if plain and wanted(module):  # type: ignore[arg-type]
            module.__class__ = new  # type: ignore[assignment]


def _compiler_options(*, cuda_graph: bool, autotune: bool) -> dict[str, Any]:
    return {
        "triton.cudagraphs": cuda_graph,
        "max_autotune": autotune,
        "coordinate_descent_tuning": autotune,
        "conv_1x1_as_mm": True,
        "epilogue_fusion": True,
    }
