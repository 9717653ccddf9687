_base_ = "../_base_/mask-rcnn_fpn_1x_coco.py"

norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    backbone=dict(type="PlainMambaAdapter", arch="plainmamba_l2", drop_path_rate=0.2),
    neck=dict(in_channels=[384, 384, 384, 384], norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=norm_cfg)),
)

param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
