# Cascade Mask R-CNN with RepLKNet-31B, trained on ImageNet-1K, on COCO 2017.
# Source:         DingXiaoH/RepLKNet-pytorch, detection/configs/RepLKNet-31B_1Kpretrain_cascade_mask_rcnn_3x_coco.py
# Command:        torchrun --nproc_per_node 8 -m replknet detect train --config recipes/detection/replknet_31b_1k_cascade_mask_rcnn_3x.py --data /data/coco --output runs/replknet_31b_1k_cascade_mask_rcnn_3x
# Hardware:       not stated by the release; 1 picture on each GPU, and the learning rate is not scaled
# Published score: 52.2 AP box, 45.2 AP mask
# Status:         not run
_base_ = ["_base_/cascade_mask_rcnn_3x.py"]
