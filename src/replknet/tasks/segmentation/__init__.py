"""Semantic segmentation with UperNet on MMSegmentation's maintained fork.

Configs import it as `custom_imports = dict(imports=['replknet.tasks.segmentation'])`, which registers the backbone
`RepLKNet`, the optimizer constructor `RepLKNetLayerDecay`, the data set `SegmentationFolder` and the transform
`LoadCheckedAnnotations`.
"""

import importlib

from replknet.tasks.openmmlab import require

require("segmentation")
for _module in ("openmmlab.backbone", "openmmlab.layer_decay", "segmentation.folder_dataset", "segmentation.labels"):
    importlib.import_module(f"replknet.tasks.{_module}")
