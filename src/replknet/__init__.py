"""replknet: large-kernel convolutional networks in PyTorch."""

from replknet import layers, models, ops

__all__ = ["layers", "models", "ops"]
__version__ = "0.1.0"
