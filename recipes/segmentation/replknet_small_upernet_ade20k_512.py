# UperNet with RepLKNet-small (this project's, 21.1 M parameters in the classifier) on ADE20K, 512x512 crops, for one GPU.
# Source:          this project; the release's heads, optimizer and schedule shape, the warm-up and length of its 31B recipe at batch 16
# Command:         replknet segment train --config recipes/segmentation/replknet_small_upernet_ade20k_512.py --data /data/ADEChallengeData2016 --output runs/replknet_small_ade20k
# Hardware:        one GPU with 16 pictures at a time; more GPUs: divide batch_size
# Published score: none; start the backbone from a classifier of yours with
#                  --cfg_options "model.backbone.init_cfg={'type': 'Pretrained', 'checkpoint': 'best.ckpt'}"
# Status:          not run
_base_ = ["_base_/upernet_replknet_31b.py", "_base_/ade20k.py", "_base_/runtime.py"]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(model="replknet_small", drop_path_rate=0.1, grad_checkpointing=False),
    decode_head=dict(in_channels=[72, 144, 288, 576], channels=512),
    auxiliary_head=dict(in_channels=288),
)
train_dataloader = dict(batch_size=16, num_workers=8)

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, begin=0, end=1501, by_epoch=False),
    dict(type="PolyLR", power=1.0, eta_min=0.0, begin=0, end=160001, by_epoch=False),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=160000, val_interval=8000)
