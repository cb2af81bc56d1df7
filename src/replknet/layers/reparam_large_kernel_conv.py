"""A large depthwise convolution that trains with smaller and dilated branches beside it and runs as one kernel."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from replknet.layers.algebra import dilate_kernel, pad_kernel, replaced
from replknet.layers.conv_norm import ConvNorm, NormLayer, refuse_training
from replknet.layers.depthwise_conv2d import DepthwiseConv2d

Size = int | Sequence[int]


class Branch(NamedTuple):
    """A further parallel branch: `kernel_size` (odd) and `dilation`, each one number or one per dimension."""

    kernel_size: Size
    dilation: Size = 1


class ReparamLargeKernelConv(nn.Module):
    """Depthwise "same" convolution of a large kernel, with parallel branches in training, each with its norm.

    y = norm(large(x)) + norm(small(x)) + sum over branches of norm(branch(x))

    `fuse()` melts all of them into one convolution with a bias. State-dict keys are the release's:
    `lkb_origin.{conv,bn}.*`, `small_conv.{conv,bn}.*` (and `branches.N.{conv,bn}.*`); fused
    `lkb_reparam.{weight,bias}`.

    Args:
        channels: channels of input and output.
        kernel_size: extent of the large kernel, odd; one number or `(Kh, Kw)`.
        small_kernel: extent of the small kernel beside it, odd; None for none.
        branches: any number of further branches, dilated or not, for example `[Branch(5, 1), Branch(7, 2)]`. The
            fused kernel has the largest extent of all in each dimension, so that `(51, 5)` beside `(5, 51)` works.
        stride: of all branches alike.
        norm_layer: makes the norm of every branch.
        merged: build the fused form right away.

    Raises:
        ValueError: an even or non-positive extent or dilation, or a small kernel larger than the large one.

    Source: Ding et al. 2022, arXiv:2203.06717, sec. 3.1; Ding et al. 2024, arXiv:2311.15599, for dilated branches.
    """

    conv_class: type[nn.Module] = DepthwiseConv2d
    dims = 2

    def __init__(
        self,
        channels: int,
        kernel_size: Size,
        small_kernel: Size | None = None,
        *,
        branches: Sequence[Branch | Size] = (),
        stride: int = 1,
        norm_layer: NormLayer | None = None,
        merged: bool = False,
    ):
        super().__init__()
        norm_layer = norm_layer or {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[self.dims]
        self.channels, self.stride = channels, stride
        large = self._branch(kernel_size, "kernel_size")
        small = None if small_kernel is None else self._branch(small_kernel, "small_kernel")
        if small and any(s > k for s, k in zip(_extent(small), _extent(large), strict=True)):
            raise ValueError(f"small_kernel {small_kernel} is larger than kernel_size {kernel_size}")
        more = [self._branch(b, f"branches[{i}]") for i, b in enumerate(branches)]
        everyone = [large, *([small] if small else []), *more]
        self.kernel_size = tuple(max(sizes) for sizes in zip(*map(_extent, everyone), strict=True))
        if merged:
            self.lkb_reparam = self._conv(Branch(self.kernel_size, (1,) * self.dims), bias=True)
            return
        self.lkb_origin = ConvNorm(self._conv(large), norm_layer(channels))
        if small:
            self.small_conv = ConvNorm(self._conv(small), norm_layer(channels))
        if more:
            self.branches = nn.ModuleList(ConvNorm(self._conv(b), norm_layer(channels)) for b in more)

    @property
    def is_merged(self) -> bool:
        """Whether one convolution with a bias stands for all branches."""
        return hasattr(self, "lkb_reparam")

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, *size]` to `[N, C, *ceil(size / stride)]`."""
        if self.is_merged:
            return self.lkb_reparam(x)
        first, *others = self._units()
        y = first(x)
        for unit in others:
            y = y + unit(x)
        return y

    @torch.no_grad()
    def fuse(self) -> "ReparamLargeKernelConv":
        """Replace all branches by `lkb_reparam`; in place, idempotent, evaluation only.

        Raises:
            ValueError: in training mode, or a norm that is no fixed affine map.
        """
        refuse_training(self)
        if self.is_merged:
            return self
        weight, bias = self._merged_weight_and_bias()
        old = self.lkb_origin.conv.weight
        merged = self._conv(Branch(self.kernel_size, (1,) * self.dims), bias=True, device="meta")
        merged.weight = replaced(old, weight)  # type: ignore[arg-type]
        merged.bias = replaced(old, bias)  # type: ignore[arg-type]
        for name in ("lkb_origin", "small_conv", "branches"):
            if hasattr(self, name):
                delattr(self, name)
        self.lkb_reparam = merged.eval()
        return self

    def _merged_weight_and_bias(self) -> tuple[Tensor, Tensor]:
        weights, biases = [], []
        for unit in self._units():
            weight, bias = unit.equivalent()
            weights.append(pad_kernel(dilate_kernel(weight, unit.conv.dilation), self.kernel_size))  # type: ignore[arg-type]
            biases.append(bias)
        return torch.stack(weights).sum(0), torch.stack(biases).sum(0)

    def _units(self) -> list[ConvNorm]:
        small = [self.small_conv] if hasattr(self, "small_conv") else []
        return [self.lkb_origin, *small, *getattr(self, "branches", ())]

    def _branch(self, spec: Branch | Size, name: str) -> Branch:
        kernel, dilation = spec if isinstance(spec, Branch) else (spec, 1)
        kernel, dilation = self._sizes(kernel, name), self._sizes(dilation, name)
        if any(k < 1 or k % 2 == 0 for k in kernel):
            raise ValueError(f"{name} must be odd and positive to have a centre; got {kernel}")
        if any(d < 1 for d in dilation):
            raise ValueError(f"the dilation of {name} must be positive; got {dilation}")
        return Branch(kernel, dilation)

    def _sizes(self, size: Size, name: str) -> tuple[int, ...]:
        sizes = tuple(size) if isinstance(size, Sequence) else (size,) * self.dims
        if len(sizes) != self.dims or not all(isinstance(s, int) for s in sizes):
            raise ValueError(f"{name} must be an integer or {self.dims} integers; got {size!r}")
        return sizes

    def _conv(self, branch: Branch, bias: bool = False, device: str | None = None) -> nn.Module:
        kernel, dilation = branch
        padding = tuple(size // 2 for size in _extent(branch))
        return self.conv_class(
            self.channels,
            self.channels,
            kernel,
            stride=self.stride,
            padding=padding,
            dilation=dilation,
            groups=self.channels,
            bias=bias,
            device=device,
        )


class ReparamLargeKernelConv1d(ReparamLargeKernelConv):
    """The same for sequences `[N, C, L]`, by torch's own kernels."""

    conv_class, dims = nn.Conv1d, 1


class ReparamLargeKernelConv3d(ReparamLargeKernelConv):
    """The same for volumes `[N, C, D, H, W]`, by torch's own kernels."""

    conv_class, dims = nn.Conv3d, 3


def _extent(branch: Branch) -> tuple[int, ...]:
    """Pixels that a (dilated) kernel spans in each dimension."""
    kernel, dilation = branch
    assert not isinstance(kernel, int)
    assert not isinstance(dilation, int)
    return tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
