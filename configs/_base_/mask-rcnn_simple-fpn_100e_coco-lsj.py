# ViTDet's Mask R-CNN: a simple feature pyramid and heads with layer norms. A leaf names the backbone and its width.
_base_ = [
    "models/mask-rcnn_fpn.py",
    "datasets/coco_lsj.py",
    "schedules/vitdet_100e.py",
    "mmdet_runtime.py",
]

norm_cfg = dict(type="LayerNorm2d", eps=1e-6)
model = dict(
    data_preprocessor=dict(pad_size_divisor=1024),
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", out_channels=256, num_outs=5),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)

default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=5000),
)
log_processor = dict(by_epoch=False)
