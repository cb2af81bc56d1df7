"""`nn.Linear` with the activation behind it in the same kernel."""

from torch import Tensor, nn

from replknet.layers.pointwise_conv2d import ACTIVATIONS, PointwiseConv2d, product_over_channels
from replknet.ops import Epilogue, recording_a_portable_graph


class ActivatedLinear(nn.Linear):
    """Drop-in `nn.Linear`, `[..., K]` to `[..., C]`.

    Attributes:
        activation: None, "relu" or "gelu", as `PointwiseConv2d`.
    """

    activation: Epilogue | None = None
    absorb = PointwiseConv2d.absorb

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's own name
        """`activation(input weight^T + bias)`."""
        if recording_a_portable_graph() or input.dim() < 2:
            return ACTIVATIONS[self.activation](super().forward(input))
        return product_over_channels(input, self.weight, self.bias, self.activation)
