_base_ = "../_base_/mask-rcnn_fpn_1x_coco.py"

model = dict(
    backbone=dict(type="VMamba", arch="vanilla_vmamba_base", drop_path_rate=0.2),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
