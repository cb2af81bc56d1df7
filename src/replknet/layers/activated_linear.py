"""`nn.Linear` with the activation behind it in the same kernel."""

from torch import Tensor, nn

from replknet.layers.epilogue import Activated, product_over_channels
from replknet.ops import recording_a_portable_graph


class ActivatedLinear(Activated, nn.Linear):
    """Drop-in `nn.Linear`, `[..., K]` to `[..., C]`: same parameters and state-dict keys."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's own name
        """`activation(input weight^T + bias)`."""
        if recording_a_portable_graph() or input.dim() < 2:
            return self.activate(super().forward(input))
        return product_over_channels(input, self.weight, self.bias, self.activation)
