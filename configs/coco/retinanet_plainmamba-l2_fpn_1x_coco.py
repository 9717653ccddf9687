_base_ = "../_base_/retinanet_plainmamba_1x_coco.py"

model = dict(
    backbone=dict(arch="plainmamba_l2", drop_path_rate=0.2),
    neck=dict(in_channels=[384, 384, 384, 384]),
)
