_base_ = "../_base_/retinanet_plainmamba_1x_coco.py"

model = dict(
    backbone=dict(arch="plainmamba_l3", out_indices=(8, 17, 26, 35), num_heads=8, drop_path_rate=0.3),
    neck=dict(in_channels=[448, 448, 448, 448]),
)
