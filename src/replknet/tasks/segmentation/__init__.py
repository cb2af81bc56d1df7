"""Semantic segmentation with UperNet on MMSegmentation's maintained fork.

Configs import it as `custom_imports = dict(imports=['replknet.tasks.segmentation'])`, which registers the backbone
`RepLKNet` and the optimizer constructor `RepLKNetLayerDecay`.
"""

from replknet.tasks.openmmlab import require

require("segmentation")

import replknet.tasks.openmmlab.backbone  # noqa: E402
import replknet.tasks.openmmlab.layer_decay  # noqa: E402, F401
