# FCOS with RepLKNet-nano and narrow heads: for small machines, a CPU too.
# Source:          this project
# Command:         replknet detect train --config recipes/detection/replknet_nano_fcos.py --train_annotations train.json --train_images pictures --val_annotations val.json --val_images pictures --output runs/mine
# Hardware:        one GPU, or a CPU for a few pictures
# Published score: none
# Status:          not run on COCO; run on two pictures on a CPU, docs/detection.md
_base_ = ["_base_/fcos.py", "_base_/small_pictures.py"]

model = dict(
    backbone=dict(
        model="replknet_nano",
        stem_stride=4,
        drop_path_rate=0.0,
        grad_checkpointing=False,
        norm_cfg=dict(type="BN"),
        init_cfg=None,
    ),
    neck=dict(in_channels=[24, 48, 96, 192], out_channels=64),
    bbox_head=dict(
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        norm_cfg=dict(type="GN", num_groups=16),
        norm_on_bbox=True,
        centerness_on_reg=True,
        center_sampling=True,
        loss_bbox=dict(type="GIoULoss", loss_weight=1.0),
    ),
)
train_pipeline = [
    dict(type="LoadPicture"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(640, 320), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
