"""The three passes as `torch.library` operators: fake kernels, autograd of any order, vmap, FLOP counts.

All are opaque to torch.compile. The forward pass is linear in x and in the weight, and its two gradients are bilinear
in what they take, so that the gradient of each of the three is made of the other two: double backward is exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from replknet.ops._decided import decide, key_of, run_of
from replknet.ops._dispatch import Choice, choose, implementation
from replknet.ops._problem import Pass, as_format_of, dense, in_format_of, is_channels_last, is_cnhw, problem_of

_PLAIN = (Tensor, torch.nn.Parameter)
_LIBRARY = torch.library.Library("replknet", "DEF")
_FORWARD = "replknet::depthwise_conv2d"
_INPUT_GRAD = "replknet::depthwise_conv2d_input_grad"
_WEIGHT_GRAD = "replknet::depthwise_conv2d_weight_grad"


def _define(schema: str) -> None:
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


_define("depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, str? activation, str backend) -> Tensor")
_define("depthwise_conv2d_input_grad(Tensor grad_y, Tensor weight, str backend) -> Tensor")
_define("depthwise_conv2d_weight_grad(Tensor grad_y, Tensor x, SymInt kh, SymInt kw, str backend) -> Tensor")


def _run(choice: Choice, pass_: Pass, device: torch.device, *arguments) -> Tensor:
    run = getattr(implementation(choice.backend), pass_)
    if choice.tile is not None:
        run = functools.partial(run, tile=choice.tile)
    if torch.is_autocast_enabled(device.type):
        # The caller has cast already; a backend that computes in a wider dtype must not be cast back.
        with torch.autocast(device.type, enabled=False):
            return run(*arguments)
    return run(*arguments)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, backend: str) -> Tensor:
    x = dense(x)
    choice = choose("forward", problem_of(x, (weight.shape[2], weight.shape[3])), backend)
    if x.numel() == 0:
        return _empty_in_format(x)
    y = _run(choice, "forward", x.device, x, weight.contiguous(), bias, activation)
    return as_format_of(y, x)


def _input_grad(grad_y: Tensor, weight: Tensor, backend: str) -> Tensor:
    grad_y = dense(grad_y)
    choice = choose("input_grad", problem_of(grad_y, (weight.shape[2], weight.shape[3])), backend)
    if grad_y.numel() == 0:
        return _empty_in_format(grad_y)
    return as_format_of(_run(choice, "input_grad", grad_y.device, grad_y, weight.contiguous()), grad_y)


def _weight_grad(grad_y: Tensor, x: Tensor, kh: int, kw: int, backend: str) -> Tensor:
    x = dense(x)
    choice = choose("weight_grad", problem_of(x, (kh, kw)), backend)
    if x.numel() == 0:
        return x.new_zeros(x.shape[1], 1, kh, kw)
    grad_y = in_format_of(grad_y, x)
    return _run(choice, "weight_grad", x.device, grad_y, x, kh, kw).contiguous()


def _empty_in_format(x: Tensor) -> Tensor:
    N, C, H, W = x.shape
    if is_cnhw(x):
        return x.new_empty(C, N, H, W).transpose(0, 1)
    return torch.empty_like(x, memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)


for _name, _kernel, _fake in (
    ("depthwise_conv2d", _forward, lambda x, weight, bias, activation, backend: _empty_in_format(x)),
    ("depthwise_conv2d_input_grad", _input_grad, lambda grad_y, weight, backend: _empty_in_format(grad_y)),
    (
        "depthwise_conv2d_weight_grad",
        _weight_grad,
        lambda grad_y, x, kh, kw, backend: x.new_empty(x.shape[1], 1, kh, kw),
    ),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"replknet::{_name}", _fake, lib=_LIBRARY)

_OPERATORS = {
    "forward": torch.ops.replknet.depthwise_conv2d.default,
    "input_grad": torch.ops.replknet.depthwise_conv2d_input_grad.default,
    "weight_grad": torch.ops.replknet.depthwise_conv2d_weight_grad.default,
}


def transformed() -> bool:
    """Whether the call is inside one of torch.func's transforms."""
    # Autograd registered on a library operator cannot be nested in torch.func's transforms; autograd.Function can.
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _nobody_listens(*tensors: Tensor | None) -> bool:
    """Whether a call can go past torch's dispatcher, which costs 20 us: small problems take no longer than that.

    Compilers, transforms, dispatch modes (FLOP counters, fake tensors), subclasses and autograd have to see a call.
    """
    if torch.compiler.is_compiling() or transformed() or torch._C._len_torch_dispatch_stack():
        return False
    graph = torch.is_grad_enabled()
    for value in tensors:
        if value is None:
            continue
        plain = type(value) in _PLAIN and (value.is_cpu or value.is_cuda)
        if not plain or (graph and value.requires_grad):
            return False
    return True


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, backend: str) -> Tensor:
    """The operator `replknet::depthwise_conv2d`, usable inside torch.func's transforms."""
    if _nobody_listens(x, weight, bias):
        return _forward(x, weight, bias, activation, backend)
    run = _ForwardFunction.apply if transformed() else _OPERATORS["forward"]
    return run(x, weight, bias, activation, backend)


def input_grad(grad_y: Tensor, weight: Tensor, backend: str) -> Tensor:
    """The operator `replknet::depthwise_conv2d_input_grad`, likewise."""
    key = key_of("input_grad", grad_y, weight, None, None, backend)
    if run := run_of(key) or decide(key, "input_grad", (grad_y, weight), (weight.shape[2], weight.shape[3]), backend):
        dx = run(grad_y, weight)
        return dx if dx.stride() == grad_y.stride() else as_format_of(dx, grad_y)
    if _nobody_listens(grad_y, weight):
        return _input_grad(grad_y, weight, backend)
    run = _InputGradFunction.apply if transformed() else _OPERATORS["input_grad"]
    return run(grad_y, weight, backend)


def weight_grad(grad_y: Tensor, x: Tensor, kh: int, kw: int, backend: str) -> Tensor:
    """The operator `replknet::depthwise_conv2d_weight_grad`, likewise."""
    key = key_of("weight_grad", grad_y, x, None, (kh, kw), backend)
    if run := run_of(key) or decide(key, "weight_grad", (grad_y, x), (kh, kw), backend):
        return run(grad_y, x, kh, kw).contiguous()
    if _nobody_listens(grad_y, x):
        return _weight_grad(grad_y, x, kh, kw, backend)
    run = _WeightGradFunction.apply if transformed() else _OPERATORS["weight_grad"]
    return run(grad_y, x, kh, kw, backend)


def _save_forward(ctx, inputs, output) -> None:
    x, weight, bias, activation, backend = inputs
    # y > 0 says where the ReLU let the gradient pass, so that nothing before it has to be kept.
    ctx.save_for_backward(x, weight, output if activation == "relu" else None)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.backend = backend


def _backward_forward(ctx, grad_y: Tensor):
    x, weight, y = ctx.saved_tensors
    if y is not None:
        grad_y = torch.ops.aten.threshold_backward(grad_y, y, 0)
    grad_y = in_format_of(grad_y, x)
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        dx = input_grad(grad_y, weight, ctx.backend)
    if ctx.needs_input_grad[1]:
        dw = weight_grad(grad_y, x, weight.shape[2], weight.shape[3], ctx.backend)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        wide = torch.float64 if grad_y.dtype == torch.float64 else torch.float32
        db = grad_y.sum((0, 2, 3), dtype=wide).to(ctx.bias_dtype)
    return dx, dw, db, None, None


def _save_input_grad(ctx, inputs, output) -> None:
    grad_y, weight, ctx.backend = inputs
    ctx.save_for_backward(grad_y, weight)


def _backward_input_grad(ctx, grad_dx: Tensor):
    grad_y, weight = ctx.saved_tensors
    d_grad_y = d_weight = None
    if ctx.needs_input_grad[0]:
        d_grad_y = forward(grad_dx, weight, None, None, ctx.backend)
    if ctx.needs_input_grad[1]:
        d_weight = weight_grad(grad_y, grad_dx, weight.shape[2], weight.shape[3], ctx.backend)
    return d_grad_y, d_weight, None


def _save_weight_grad(ctx, inputs, output) -> None:
    grad_y, x, _, _, ctx.backend = inputs
    ctx.save_for_backward(grad_y, x)


def _backward_weight_grad(ctx, grad_dw: Tensor):
    grad_y, x = ctx.saved_tensors
    d_grad_y = d_x = None
    if ctx.needs_input_grad[0]:
        d_grad_y = forward(x, grad_dw, None, None, ctx.backend)
    if ctx.needs_input_grad[1]:
        d_x = input_grad(grad_y, grad_dw, ctx.backend)
    return d_grad_y, d_x, None, None, None


torch.library.register_autograd(_FORWARD, _backward_forward, setup_context=_save_forward, lib=_LIBRARY)
torch.library.register_autograd(_INPUT_GRAD, _backward_input_grad, setup_context=_save_input_grad, lib=_LIBRARY)
torch.library.register_autograd(_WEIGHT_GRAD, _backward_weight_grad, setup_context=_save_weight_grad, lib=_LIBRARY)


def _leading(value: Tensor, dim: int | None, size: int) -> Tensor:
    """The value with the mapped dimension first, repeated there if it is not mapped."""
    return value.movedim(dim, 0) if dim is not None else value.expand(size, *value.shape)


def _into_channels(value: Tensor, dim: int | None, size: int) -> Tensor:
    """`[N, C, H, W]` with the mapped dimension made part of the channels: `[N, B * C, H, W]`."""
    return _leading(value, dim, size).transpose(0, 1).flatten(1, 2)


def _from_channels(value: Tensor, size: int) -> Tensor:
    """The inverse of `_into_channels`, the mapped dimension first."""
    return value.unflatten(1, (size, -1)).movedim(1, 0)


def _vmap_forward(info, in_dims, x, weight, bias, activation, backend):
    size = info.batch_size
    if in_dims[1] is None and in_dims[2] is None:
        y = forward(x.movedim(in_dims[0], 0).flatten(0, 1), weight, bias, activation, backend)
        return y.unflatten(0, (size, -1)), 0
    x = _into_channels(x, in_dims[0], size)
    weight = _leading(weight, in_dims[1], size).flatten(0, 1)
    bias = None if bias is None else _leading(bias, in_dims[2], size).flatten()
    return _from_channels(forward(x, weight, bias, activation, backend), size), 0


def _vmap_input_grad(info, in_dims, grad_y, weight, backend):
    size = info.batch_size
    if in_dims[1] is None:
        dx = input_grad(grad_y.movedim(in_dims[0], 0).flatten(0, 1), weight, backend)
        return dx.unflatten(0, (size, -1)), 0
    weight = _leading(weight, in_dims[1], size).flatten(0, 1)
    return _from_channels(input_grad(_into_channels(grad_y, in_dims[0], size), weight, backend), size), 0


def _vmap_weight_grad(info, in_dims, grad_y, x, kh, kw, backend):
    size = info.batch_size
    dw = weight_grad(_into_channels(grad_y, in_dims[0], size), _into_channels(x, in_dims[1], size), kh, kw, backend)
    return dw.unflatten(0, (size, -1)), 0


def _function(name: str, save: Callable, backward: Callable, vmap: Callable) -> type[torch.autograd.Function]:
    members = {"forward": _OPERATORS[name], "setup_context": save, "backward": backward, "vmap": vmap}
    members = {key: staticmethod(value) for key, value in members.items()}
    return type(f"depthwise_conv2d_{name}", (torch.autograd.Function,), members)


_ForwardFunction = _function("forward", _save_forward, _backward_forward, _vmap_forward)
_InputGradFunction = _function("input_grad", _save_input_grad, _backward_input_grad, _vmap_input_grad)
_WeightGradFunction = _function("weight_grad", _save_weight_grad, _backward_weight_grad, _vmap_weight_grad)

torch.library.register_vmap(_FORWARD, _vmap_forward, lib=_LIBRARY)
torch.library.register_vmap(_INPUT_GRAD, _vmap_input_grad, lib=_LIBRARY)
torch.library.register_vmap(_WEIGHT_GRAD, _vmap_weight_grad, lib=_LIBRARY)


def _flops(x_shape, kh: int, kw: int) -> int:
    # As torch counts its own convolutions: two per tap, padding included.
    n, c, h, w = x_shape
    return 2 * n * c * h * w * kh * kw


@register_flop_formula(torch.ops.replknet.depthwise_conv2d)
def _forward_flops(x_shape, w_shape, *args, out_shape=None, **kwargs) -> int:
    return _flops(x_shape, *w_shape[2:])


@register_flop_formula(torch.ops.replknet.depthwise_conv2d_input_grad)
def _input_grad_flops(grad_shape, w_shape, *args, out_shape=None, **kwargs) -> int:
    return _flops(grad_shape, *w_shape[2:])


@register_flop_formula(torch.ops.replknet.depthwise_conv2d_weight_grad)
def _weight_grad_flops(grad_shape, x_shape, kh, kw, *args, out_shape=None, **kwargs) -> int:
    return _flops(x_shape, kh, kw)
