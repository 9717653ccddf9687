_base_ = "../_base_/mask-rcnn_fpn_1x_coco.py"

model = dict(
    backbone=dict(type="GroupMamba", arch="groupmamba_tiny", drop_path_rate=0.05),
    neck=dict(in_channels=[64, 128, 348, 448]),
)
