# Cascade Mask R-CNN with RepLKNet-nano and narrow heads: for small machines, a CPU too.
# Source:          this project
# Command:         replknet detect train --config recipes/detection/replknet_nano_cascade_mask_rcnn.py --train_annotations train.json --train_images pictures --val_annotations val.json --val_images pictures --output runs/mine
# Hardware:        one GPU, or a CPU for a few pictures
# Published score: none
# Status:          not run on COCO; run on two pictures on a CPU, docs/detection.md
_base_ = ["_base_/cascade_mask_rcnn.py", "_base_/small_pictures.py"]

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
    rpn_head=dict(in_channels=64, feat_channels=64),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=[
            dict(
                type="ConvFCBBoxHead",
                num_shared_convs=2,
                num_shared_fcs=1,
                in_channels=64,
                conv_out_channels=64,
                fc_out_channels=256,
                roi_feat_size=7,
                num_classes=80,
                bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0, 0.0, 0.0, 0.0], target_stds=deviations),
                reg_class_agnostic=False,
                reg_decoded_bbox=True,
                norm_cfg=dict(type="BN", requires_grad=True),
                loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
            )
            for deviations in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
        ],
        mask_roi_extractor=dict(out_channels=64),
        mask_head=dict(in_channels=64, conv_out_channels=64, num_convs=2),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=500, max_per_img=256),
        rcnn=[
            dict(
                assigner=dict(
                    type="MaxIoUAssigner",
                    pos_iou_thr=iou,
                    neg_iou_thr=iou,
                    min_pos_iou=iou,
                    match_low_quality=False,
                    ignore_iof_thr=-1,
                ),
                sampler=dict(type="RandomSampler", num=128, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=True),
                mask_size=28,
                pos_weight=-1,
                debug=False,
            )
            for iou in (0.5, 0.6, 0.7)
        ],
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=256)),
)
val_evaluator = dict(metric=["bbox", "segm"])
test_evaluator = val_evaluator
