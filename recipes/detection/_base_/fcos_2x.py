# The release's training of FCOS: 24 epochs, AdamW, short side 640 or 800 pixels, gradients clipped.
_base_ = ["fcos.py", "coco.py", "runtime.py"]

train_pipeline = [
    dict(type="LoadPicture"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomChoiceResize", scales=[(1333, 640), (1333, 800)], keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline))

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=24, val_interval=1)
# mmengine counts the steps between begin and end: 501 for the release's 500 iterations of warm-up.
param_scheduler = [
    dict(type="ConstantLR", factor=1.0 / 3, by_epoch=False, begin=0, end=501),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=24, milestones=[16, 22], gamma=0.1),
]
# AdamW's own arguments only: the release's file inherited SGD's momentum, which AdamW refuses.
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0),
    clip_grad=dict(max_norm=35, norm_type=2),
)
