_base_ = "../_base_/mask-rcnn_fpn_1x_coco.py"

model = dict(
    backbone=dict(type="VMamba", arch="vmamba_base_s2l15", drop_path_rate=0.6),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
