"""replknet: large-kernel convolutional networks in PyTorch."""

from replknet import layers, models, ops
from replknet.layers import reparameterize
from replknet.models.accelerate import accelerate
from replknet.models.optimize import optimize

__all__ = ["accelerate", "layers", "models", "ops", "optimize", "reparameterize"]
__version__ = "0.1.0"
