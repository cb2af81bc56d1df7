"""replknet: large-kernel convolutional networks in PyTorch."""

from replknet import layers, models, ops
from replknet.layers import reparameterize

__all__ = ["layers", "models", "ops", "reparameterize"]
__version__ = "0.1.0"
