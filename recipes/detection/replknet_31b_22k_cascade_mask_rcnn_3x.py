# Cascade Mask R-CNN with RepLKNet-31B, trained on ImageNet-22K, on COCO 2017.
# Source:         DingXiaoH/RepLKNet-pytorch, detection/configs/RepLKNet-31B_22Kpretrain_cascade_mask_rcnn_3x_coco.py
# Command:        torchrun --nproc_per_node 8 -m replknet detect train --config recipes/detection/replknet_31b_22k_cascade_mask_rcnn_3x.py --data /data/coco --output runs/replknet_31b_22k_cascade_mask_rcnn_3x
# Hardware:       not stated by the release; 1 picture on each GPU, and the learning rate is not scaled
# Published score: 53.0 AP box, 46.0 AP mask
# Status:         not run
_base_ = ["_base_/cascade_mask_rcnn_3x.py"]

model = dict(
    backbone=dict(drop_path_rate=0.4, init_cfg=dict(type="Pretrained", checkpoint="replknet_31b.in22k")),
)
