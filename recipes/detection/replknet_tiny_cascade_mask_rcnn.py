# Cascade Mask R-CNN with RepLKNet-tiny, on COCO or on one's own data in COCO's format.
# Source:          this project; the release's heads, optimizer and schedule
# Command:         replknet detect train --config recipes/detection/replknet_tiny_cascade_mask_rcnn.py --train_annotations train.json --train_images pictures --val_annotations val.json --val_images pictures --output runs/mine
# Hardware:        one GPU; 8 pictures at a time, short side of 480 to 800 pixels
# Published score: none
# Status:          not run on COCO; tests/tasks/detection trains it on two pictures until it finds their objects again
_base_ = ["_base_/cascade_mask_rcnn_3x.py"]

model = dict(
    backbone=dict(
        model="replknet_tiny", drop_path_rate=0.1, grad_checkpointing=False, norm_cfg=dict(type="BN"), init_cfg=None
    ),
    neck=dict(in_channels=[48, 96, 192, 384]),
)
train_dataloader = dict(batch_size=8, num_workers=8)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
