"""The RepLKNet family as timm models, and weights for them; importing this registers them with timm."""

from replknet.models import family
from replknet.models.checkpoints import LoadReport, load_checkpoint, read_state_dict
from replknet.models.factory import create_model
from replknet.models.replknet import RepLKNet

__all__ = ["LoadReport", "RepLKNet", "create_model", "family", "load_checkpoint", "read_state_dict"]
