_base_ = "../_base_/mask-rcnn_fpn_1x_coco.py"

model = dict(
    backbone=dict(type="LocalVMamba", arch="localvmamba_small", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
