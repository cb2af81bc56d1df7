"""GELU whose output a compiler computes twice instead of keeping it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from replknet.ops import recording_a_portable_graph


class RecomputedGELU(nn.GELU):
    """Drop-in `nn.GELU` of which compiled training keeps no output: backward has the input, and reads it anyway.

    The widest tensor of a block of two 1x1 convolutions is then stored once instead of twice.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Any shape, to the same."""
        if torch.compiler.is_compiling() and torch.is_grad_enabled() and not recording_a_portable_graph():
            return checkpoint(F.gelu, input, approximate=self.approximate, use_reentrant=False)  # type: ignore[return-value]
        return F.gelu(input, approximate=self.approximate)
