# UperNet with RepLKNet-31B (ImageNet-22K) on ADE20K, 640x640 crops.
# Source:          DingXiaoH/RepLKNet-pytorch, segmentation/configs/RepLKNet-31B_22Kpretrain_upernet_160k_ade20k_640.py
# Command:         torchrun --nproc_per_node 8 -m replknet segment train --config recipes/segmentation/replknet_31b_22k_upernet_ade20k_640.py --data /data/ADEChallengeData2016 --output runs/replknet_31b_22k_upernet_ade20k_640
# Hardware:        the schedule is that of 64 GPUs with 2 pictures each; with fewer GPUs multiply max_iters, the
#                  warm-up and both ends of param_scheduler by 64 / GPUs (320000 iterations on 8)
# Published score: 51.5 % mIoU, 52.3 % at six sizes with flip (--tta true)
# Status:          not run
_base_ = ["_base_/upernet_replknet_31b.py", "_base_/ade20k.py", "_base_/runtime.py"]

model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(drop_path_rate=0.3, init_cfg=dict(type="Pretrained", checkpoint="replknet_31b.in22k")),
    test_cfg=dict(mode="slide", crop_size=(640, 640), stride=(426, 426)),
)

crop_size = (640, 640)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadCheckedAnnotations", num_classes=150),
    dict(type="RandomResize", scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline))

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
# Warm-up and decay run from the first iteration and multiply. mmengine counts the steps between begin and end, so that
# the ends stand one above the release's 400 and 40000.
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, begin=0, end=401, by_epoch=False),
    dict(type="PolyLR", power=1.0, eta_min=0.0, begin=0, end=40001, by_epoch=False),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=40000, val_interval=2000)
