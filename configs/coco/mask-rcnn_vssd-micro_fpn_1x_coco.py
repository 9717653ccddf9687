_base_ = "../_base_/mask-rcnn_fpn_1x_coco.py"

model = dict(
    backbone=dict(type="VSSD", arch="vssd_micro", drop_path_rate=0.1),
    neck=dict(in_channels=[48, 96, 192, 384]),
)
