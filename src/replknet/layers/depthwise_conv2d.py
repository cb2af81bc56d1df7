"""`nn.Conv2d` with groups equal to channels, run by `replknet.ops.depthwise_conv2d` where that is possible."""

import torch
from torch import Tensor, nn

from replknet import ops
from replknet.layers.cnhw_conv2d import as_cnhw
from replknet.ops import Activation, depthwise_conv2d, is_cnhw


class DepthwiseConv2d(nn.Conv2d):
    """Drop-in depthwise `nn.Conv2d`: same constructor, parameters and state-dict keys.

    Stride 1, dilation 1, odd kernel and "same" zero padding run as `replknet.ops.depthwise_conv2d`; everything else
    runs as torch's convolution, and `explain` says why.

    Shapes: `[N, C, H, W]` or `[C, H, W]` in; as `nn.Conv2d` out.

    Attributes:
        activation: None, or "relu", applied to the output in the same kernel; folding sets it (`absorb`).

    Raises:
        ValueError: groups differ from in_channels, so that the convolution is not depthwise.
    """

    activation: Activation | None = None

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.groups != self.in_channels:
            raise ValueError(
                f"a depthwise convolution has groups = in_channels, given groups={self.groups} and "
                f"in_channels={self.in_channels}; pass groups={self.in_channels}, or use nn.Conv2d"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `[N, C, H, W]` or `[C, H, W]`."""
        if why_not_same_depthwise(self) is not None:
            y = self._torchs_own(x)
            return y.relu() if self.activation == "relu" else y
        return _convolve(x, self.weight, self.bias, self.padding, self.activation)

    def _torchs_own(self, x: Tensor) -> Tensor:
        # torch.fx's proxies have no device and no strides to ask for.
        if ops.recording_a_portable_graph() or not isinstance(x, Tensor):
            return super().forward(x)
        if x.is_cpu and (half := _half_precision(x)):
            # torch's gradients of depthwise convolutions in half precision are several times slower on a CPU.
            with torch.autocast("cpu", enabled=False):
                bias = None if self.bias is None else self.bias.float()
                y = self._conv_forward(x.float(), self.weight.float(), bias).to(half)
        else:
            y = super().forward(x)
        return as_cnhw(y) if is_cnhw(x) else y

    def absorb(self, act: nn.Module) -> nn.Module:
        """Take over the activation behind this layer where its kernels can; returns what is left of it to apply."""
        if type(act) is not nn.ReLU or self.activation is not None:
            return act
        self.activation = "relu"
        return nn.Identity().train(act.training)

    def extra_repr(self) -> str:
        """As `nn.Conv2d`, and the activation."""
        return super().extra_repr() + (f", activation={self.activation}" if self.activation else "")

    def explain(self, x: Tensor) -> str:
        """Which backend runs each pass for x and why, or why this layer is torch's own convolution; nothing is run."""
        if reason := why_not_same_depthwise(self):
            return f"torch's own convolution: {reason}"
        return str(ops.explain(x.unsqueeze(0) if x.dim() == 3 else x, self.weight))


def _half_precision(x: Tensor) -> torch.dtype | None:
    """The half-precision dtype in which a convolution of x runs on a CPU, autocast's inside autocast; else None."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype if dtype in (torch.float16, torch.bfloat16) and x.dtype != torch.float64 else None


def why_not_same_depthwise(conv: nn.Conv2d) -> str | None:
    """None where the convolution is what `replknet.ops.depthwise_conv2d` computes, else the reason why not."""
    kernel = tuple(conv.kernel_size)
    same = tuple(k // 2 for k in kernel)
    if conv.groups != conv.in_channels:
        return f"not depthwise (groups={conv.groups})"
    if conv.out_channels != conv.in_channels:
        return f"{conv.out_channels} output channels for {conv.in_channels} input channels"
    if any(k % 2 == 0 for k in kernel):
        return f"even kernel {kernel[0]}x{kernel[1]}"
    if tuple(conv.stride) != (1, 1):
        return f"stride {tuple(conv.stride)}"
    if tuple(conv.dilation) != (1, 1):
        return f"dilation {tuple(conv.dilation)}"
    padding = {"same": same, "valid": (0, 0)}[conv.padding] if isinstance(conv.padding, str) else tuple(conv.padding)
    if padding != same:
        return f'padding {padding} where "same" is {same}'
    if conv.padding_mode != "zeros" and same != (0, 0):
        return f"padding mode {conv.padding_mode}"
    return None


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: str | tuple[int, ...],
    activation: Activation | None,
) -> Tensor:
    if ops.recording_a_portable_graph():
        # The layer's own constants, where the operator would have to read them off shapes while being traced.
        y = nn.functional.conv2d(x, weight, bias, padding=padding, groups=weight.shape[0])
        return y.relu() if activation == "relu" else y
    if x.dim() == 3:
        return depthwise_conv2d(x.unsqueeze(0), weight, bias, activation=activation).squeeze(0)
    return depthwise_conv2d(x, weight, bias, activation=activation)


# torch.fx records the call as one node instead of tracing into its checks.
torch.fx.wrap("_convolve")
