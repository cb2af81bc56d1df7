"""What MMCV's counter, which MMSegmentation and MMDetection used for years, gives for one call of a module.

The rules are those of `mmcv.cnn.get_model_complexity_info`, MMCV 1.x and 2.x: a multiply-add is one; convolutions add
one for each output that gets a bias, linear layers do not; a ReLU costs one for each element, pooling one for each
input, upsampling one for each output, a norm one for each input and two with scale and shift. Activations, poolings
and norms count by their exact class: SyncBatchNorm and GELU are free, as are functional calls and additions.
"""

from math import prod

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from replknet.layers.depthwise_conv2d import DepthwiseConv2d

_ACTIVATIONS = {nn.ReLU, nn.PReLU, nn.ELU, nn.LeakyReLU, nn.ReLU6}
_POOLINGS = {
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
}
_NORMS = {
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
}


def multiply_adds(module: nn.Module, x: Tensor, y: Tensor) -> int:
    """Of a convolution or linear layer that makes `y` of `x`; 0 for any other module."""
    if isinstance(module, nn.Linear):
        return y.numel() * module.in_features
    if isinstance(module, _ConvTransposeNd):
        return x.numel() * module.out_channels // module.groups * prod(module.kernel_size)
    if isinstance(module, _ConvNd):
        return y.numel() * module.in_channels // module.groups * prod(module.kernel_size)
    return 0


def mmcv_flops(module: nn.Module, x: Tensor, y: Tensor) -> int:
    """FLOPs of a module that makes `y` of `x`, both with their batch dimension; 0 for what MMCV does not count.

    Convolutions and linear layers count by kind, our own classes among them, and a ReLU that runs inside a depthwise
    convolution counts as the module that it replaced.
    """
    if isinstance(module, (nn.Linear, _ConvNd)):
        biased = isinstance(module, _ConvNd) and module.bias is not None
        activated = isinstance(module, DepthwiseConv2d) and module.activation == "relu"
        return multiply_adds(module, x, y) + (biased + activated) * y.numel()
    if type(module) in _ACTIVATIONS or type(module) is nn.Upsample:
        return y.numel()
    if type(module) in _POOLINGS:
        return x.numel()
    if type(module) in _NORMS:
        affine = getattr(module, "affine", False) or getattr(module, "elementwise_affine", False)
        return x.numel() * (2 if affine else 1)
    return 0
