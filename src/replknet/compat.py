"""Names of the original large-kernel extension, so that code written for it changes one import.

```python
# from depthwise_conv2d_implicit_gemm import DepthWiseConv2dImplicitGEMM
from replknet.compat import DepthWiseConv2dImplicitGEMM
```
"""

from replknet.layers import DepthwiseConv2d


class DepthWiseConv2dImplicitGEMM(DepthwiseConv2d):
    """Stride-1 "same" depthwise convolution with the original's constructor and state-dict keys.

    Unlike the original it also takes bfloat16, float64, CPU tensors and channels_last, and inside autocast it runs in
    autocast's dtype whatever the dtype of x.

    Args:
        channels: C.
        kernel: odd size, or `(Kh, Kw)`.
        bias: whether there is a bias `[C]`.

    Raises:
        ValueError: even kernel; the original's padding is "same", which even kernels do not have.

    Source: MegEngine's CUTLASS, examples/19_large_depthwise_conv2d_torch_extension.
    """

    def __init__(self, channels: int, kernel: int | tuple[int, int], bias: bool = False) -> None:
        size = (kernel, kernel) if isinstance(kernel, int) else tuple(kernel)
        if any(k % 2 == 0 for k in size):
            raise ValueError(f"kernel must be odd, given {kernel}; nn.Conv2d takes even kernels")
        super().__init__(channels, channels, size, padding=tuple(k // 2 for k in size), groups=channels, bias=bias)
