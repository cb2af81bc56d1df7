"""`replknet bench`: speed of the operator and of whole models. One module a second word."""

COMMANDS: dict[str, str] = {
    "op": "the depthwise convolution, forward and gradients, against torch's own",
    "model": "whole networks, inference and training, against any timm model",
    "segmentor": "whole segmentors, from pixels to logits",
}
