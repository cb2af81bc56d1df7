# FCOS with RepLKNet-tiny, on COCO or on one's own data in COCO's format.
# Source:          this project; the release's head, optimizer and schedule, centre sampling added
# Command:         replknet detect train --config recipes/detection/replknet_tiny_fcos.py --train_annotations train.json --train_images pictures --val_annotations val.json --val_images pictures --output runs/mine
# Hardware:        one GPU; 8 pictures at a time, short side of 640 or 800 pixels
# Published score: none
# Status:          not run on COCO; tests/tasks/detection trains it on two pictures until it finds their objects again
_base_ = ["_base_/fcos_2x.py"]

model = dict(
    backbone=dict(
        model="replknet_tiny", drop_path_rate=0.1, grad_checkpointing=False, norm_cfg=dict(type="BN"), init_cfg=None
    ),
    neck=dict(in_channels=[48, 96, 192, 384]),
    bbox_head=dict(
        norm_on_bbox=True,
        centerness_on_reg=True,
        center_sampling=True,
        loss_bbox=dict(type="GIoULoss", loss_weight=1.0),
    ),
)
train_dataloader = dict(batch_size=8, num_workers=8)
