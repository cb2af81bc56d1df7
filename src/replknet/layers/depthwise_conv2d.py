"""`nn.Conv2d` with groups equal to channels, run by `replknet.ops.depthwise_conv2d` where that is possible."""

from torch import Tensor, nn

from replknet.ops import depthwise_conv2d


class DepthwiseConv2d(nn.Conv2d):
    """Drop-in depthwise `nn.Conv2d`: same constructor, parameters and state-dict keys."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `[N, C, H, W]`."""
        same = tuple(k // 2 for k in self.kernel_size)
        if self.stride == (1, 1) and self.dilation == (1, 1) and self.padding == same:
            return depthwise_conv2d(x, self.weight, self.bias)
        return super().forward(x)
