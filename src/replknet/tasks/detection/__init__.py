"""Object detection and instance segmentation with FCOS and Cascade Mask R-CNN on MMDetection's maintained fork.

Configs import it as `custom_imports = dict(imports=['replknet.tasks.detection'])`, which registers the backbone
`RepLKNet`, the optimizer constructor `RepLKNetLayerDecay`, the data set `CocoPictures`, the transform `LoadPicture`,
the metric `CocoScores` and the hooks `Float32Boxes` and `EpochSeeds`.
"""

import importlib
import warnings

from replknet.tasks.openmmlab import require

require("detection")
for _module in (
    "openmmlab.backbone",
    "openmmlab.layer_decay",
    "detection.data",
    "detection.precision",
    "detection.scores",
    "detection.training",
):
    importlib.import_module(f"replknet.tasks.{_module}")
# mmdet's own lines, once a process; nothing that a user could do about them.
warnings.filterwarnings("ignore", message="To copy construct from a tensor", category=UserWarning, module="mmdet")
warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release", category=UserWarning)
