# Cascade Mask R-CNN with RepLKNet-XL, trained on MegData73M, on COCO 2017.
# Source:         DingXiaoH/RepLKNet-pytorch, detection/configs/RepLKNet-XL_MegData73Mpretrain_cascade_mask_rcnn_3x_coco.py
# Command:        torchrun --nproc_per_node 8 -m replknet detect train --config recipes/detection/replknet_xl_73m_cascade_mask_rcnn_3x.py --data /data/coco --output runs/replknet_xl_73m_cascade_mask_rcnn_3x
# Hardware:       not stated by the release; 4 pictures on each GPU, and the learning rate is not scaled
# Published score: 55.5 AP box, 48.0 AP mask
# Status:         not run
_base_ = ["_base_/cascade_mask_rcnn_3x.py"]

model = dict(
    # The pretraining's normalisation, in training, validation and test alike: the release's file validated with
    # ImageNet's.
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    backbone=dict(
        model="replknet_xl",
        drop_path_rate=0.5,
        norm_features=True,
        init_cfg=dict(type="Pretrained", checkpoint="replknet_xl.meg73m"),
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
train_dataloader = dict(batch_size=4, num_workers=4)
