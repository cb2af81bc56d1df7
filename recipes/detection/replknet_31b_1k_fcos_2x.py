# FCOS with RepLKNet-31B, trained on ImageNet-1K, on COCO 2017.
# Source:         DingXiaoH/RepLKNet-pytorch, detection/configs/RepLKNet-31B_1Kpretrain_fcos_2x_coco.py
# Command:        torchrun --nproc_per_node 8 -m replknet detect train --config recipes/detection/replknet_31b_1k_fcos_2x.py --data /data/coco --output runs/replknet_31b_1k_fcos_2x
# Hardware:       not stated by the release; 2 pictures on each GPU, and the learning rate is not scaled
# Published score: 47.0 AP box
# Status:         not run
_base_ = ["_base_/fcos_2x.py"]
