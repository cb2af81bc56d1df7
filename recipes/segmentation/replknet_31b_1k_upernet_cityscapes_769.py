# UperNet with RepLKNet-31B (ImageNet-1K) on Cityscapes, 769x769 crops.
# Source:          DingXiaoH/RepLKNet-pytorch, segmentation/configs/RepLKNet-31B_1Kpretrain_upernet_80k_cityscapes_769.py
# Command:         torchrun --nproc_per_node 8 -m replknet segment train --config recipes/segmentation/replknet_31b_1k_upernet_cityscapes_769.py --data /data/cityscapes --output runs/replknet_31b_1k_upernet_cityscapes_769
# Hardware:        the schedule is that of 32 GPUs with 2 pictures each; with fewer GPUs multiply max_iters, the
#                  warm-up and both ends of param_scheduler by 32 / GPUs (80000 iterations on 8)
# Published score: 83.1 % mIoU, 83.5 % at six sizes with flip (--tta true)
# Status:          not run
_base_ = ["_base_/upernet_replknet_31b.py", "_base_/cityscapes_769.py", "_base_/runtime.py"]

model = dict(
    data_preprocessor=dict(size=(769, 769)),
    backbone=dict(init_cfg=dict(type="Pretrained", checkpoint="replknet_31b.in1k_224")),
    decode_head=dict(num_classes=19, align_corners=True),
    auxiliary_head=dict(num_classes=19, align_corners=True),
)

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
# Warm-up and decay run from the first iteration and multiply. mmengine counts the steps between begin and end, so that
# the ends stand one above the release's 400 and 20000.
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, begin=0, end=401, by_epoch=False),
    dict(type="PolyLR", power=1.0, eta_min=0.0, begin=0, end=20001, by_epoch=False),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=20000, val_interval=2000)
