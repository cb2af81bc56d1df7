"""The way into the memory format CNHW: a dense convolution whose output has it."""

from torch import Tensor, nn

from replknet.ops import recording_a_portable_graph


class CnhwConv2d(nn.Conv2d):
    """Drop-in `nn.Conv2d` whose output `[N, C, H, W]` is a view of a contiguous `[C, N, H, W]`.

    The layers behind it keep the format of their input: `DepthwiseConv2d`, `PointwiseConv2d`, element by element
    operations; batch norms do when they are compiled.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d's own name
        """`[N, C_in, H, W]`, or `[C_in, H, W]` as `nn.Conv2d`."""
        y = super().forward(input)
        return y if y.dim() == 3 or recording_a_portable_graph() else as_cnhw(y)


def as_cnhw(x: Tensor) -> Tensor:
    """`[N, C, H, W]` as a view of a contiguous `[C, N, H, W]`; copies unless it is one."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)
