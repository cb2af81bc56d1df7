# UperNet with RepLKNet-tiny on one's own pictures: images/{train,val}, labels/{train,val} and classes.txt.
# Source:          this project; the release's heads, optimizer and schedule shape
# Command:         replknet segment train --config recipes/segmentation/replknet_tiny_upernet_folder.py --data my_pictures --output runs/my_pictures
# Hardware:        one GPU; 512x512 crops, 8 pictures at a time
# Published score: none
# Status:          not run; the small model and crops of tests/tasks/segmentation run the same config on a CPU
_base_ = ["_base_/upernet_replknet_31b.py", "_base_/runtime.py"]

crop_size = (512, 512)
scale = (2048, 512)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadCheckedAnnotations"),
    dict(type="RandomResize", scale=scale, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="LoadCheckedAnnotations"),
    dict(type="PackSegInputs"),
]
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [
                dict(type="Resize", scale=(int(scale[0] * r), int(scale[1] * r)), keep_ratio=True)
                for r in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
            ],
            [
                dict(type="RandomFlip", prob=0.0, direction="horizontal"),
                dict(type="RandomFlip", prob=1.0, direction="horizontal"),
            ],
            [dict(type="LoadCheckedAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(type="SegmentationFolder", data_root="data", split="train", pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="SegmentationFolder", data_root="data", split="val", pipeline=test_pipeline),
)
test_dataloader = val_dataloader

# The number of classes comes from classes.txt.
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(model="replknet_tiny", drop_path_rate=0.1, grad_checkpointing=False),
    decode_head=dict(in_channels=[48, 96, 192, 384], channels=256, num_classes=None),
    auxiliary_head=dict(in_channels=192, channels=128, num_classes=None),
)

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, begin=0, end=501, by_epoch=False),
    dict(type="PolyLR", power=1.0, eta_min=0.0, begin=0, end=20001, by_epoch=False),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=20000, val_interval=2000)
