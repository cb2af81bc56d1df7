"""Put the depthwise convolution of this package into a model that exists already."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from replknet.layers.depthwise_conv2d import DepthwiseConv2d, why_not_same_depthwise


@dataclass
class AccelerateReport:
    """What `accelerate` did, by module name; a module that stands in several places is listed at each.

    Attributes:
        replaced: name → what the convolution is, such as "Conv2d 128, 31x31".
        left: name → why a convolution is what it was.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)} of {len(self.replaced) + len(self.left)} convolutions"]
        lines += [f"  {count} x {what}" for what, count in Counter(self.replaced.values()).items()]
        lines += [f"  left {count}: {why}" for why, count in Counter(self.left.values()).items()]
        return "\n".join(lines)


def accelerate(model: nn.Module) -> AccelerateReport:
    """Replace, in place, every depthwise `nn.Conv2d` that `replknet.ops.depthwise_conv2d` can compute.

    A module is replaced by giving the same object the class `DepthwiseConv2d`: parameters, buffers, hooks, names,
    the training flag and every reference to it stay as they are, and so does the state dict. Outputs change by
    rounding only.

    Subclasses of `nn.Conv2d` (parametrized and quantized ones too) may compute something else and are left, with the
    reason in the report, as are strides, dilations, even kernels and other paddings.

    Args:
        model: any module; a bare convolution is replaced as well.

    Returns:
        The names that were replaced and, for every other convolution, why it was left.

    Raises:
        TypeError: the argument is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate takes an nn.Module, given {type(model).__name__}")
    report = AccelerateReport()
    reasons: dict[int, str | None] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.modules.conv._ConvNd):
            continue
        if id(module) not in reasons:
            reasons[id(module)] = _why_not(module)
            if reasons[id(module)] is None:
                module.__class__ = DepthwiseConv2d
        if reason := reasons[id(module)]:
            report.left[name] = reason
        else:
            report.replaced[name] = _describe(module)
    return report


def _why_not(module: nn.Module) -> str | None:
    if isinstance(module, DepthwiseConv2d):
        return "is this package's own already"
    if not isinstance(module, nn.Conv2d):
        return f"{type(module).__name__}, not a 2-D convolution"
    if nn.utils.parametrize.is_parametrized(module):
        return f"parametrized: {', '.join(module.parametrizations)}"  # pyright: ignore[reportCallIssue, reportArgumentType]
    if type(module) is not nn.Conv2d:
        return f"{type(module).__qualname__}, a subclass of nn.Conv2d that may compute something else"
    if "forward" in vars(module) or "_conv_forward" in vars(module):
        return "its forward is patched on the instance"
    return why_not_same_depthwise(module)


def _describe(module: nn.Module) -> str:
    assert isinstance(module, nn.Conv2d)
    kh, kw = module.kernel_size
    return f"Conv2d {module.in_channels}, {kh}x{kw}"
