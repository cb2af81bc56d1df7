"""A matrix product whose bias and activation are applied where it is written: one pass over memory instead of two."""

from typing import Literal

import torch
from torch import Tensor

Epilogue = Literal["relu", "gelu"]

_LIBRARY = torch.library.Library("replknet", "FRAGMENT")
_LIBRARY.define(
    "linear_activation(Tensor x, Tensor weight, Tensor bias, str activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def linear_activation(x: Tensor, weight: Tensor, bias: Tensor, activation: Epilogue) -> Tensor:
    """`activation(x weight^T + bias)` by the matrix library's own epilogue; for inference, no gradient.

    An operator of its own, because compilers take the library's product and the activation apart.

    Args:
        x: `[M, K]`, contiguous, any floating dtype.
        weight: `[N, K]` of x's dtype.
        bias: `[N]` of x's dtype.
        activation: "relu"; or "gelu", on CUDA in the tanh form, which is off by up to 5e-4 from the exact one.

    Returns:
        `[M, N]` in x's dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, as `torch.addmm`.

    Source: cuBLASLt's epilogues, by `torch._addmm_activation`.
    """
    return torch.ops.replknet.linear_activation(x, weight, bias, activation)


def _run(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=activation == "gelu")  # pyright: ignore[reportPrivateImportUsage]


_LIBRARY.impl("linear_activation", _run, "CompositeExplicitAutograd")
torch.library.register_fake(
    "replknet::linear_activation", lambda x, weight, bias, activation: x.new_empty(len(x), len(weight)), lib=_LIBRARY
)
