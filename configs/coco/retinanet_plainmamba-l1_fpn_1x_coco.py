_base_ = "../_base_/retinanet_plainmamba_1x_coco.py"

model = dict(
    backbone=dict(arch="plainmamba_l1", drop_path_rate=0.1),
    neck=dict(in_channels=[192, 192, 192, 192]),
)
