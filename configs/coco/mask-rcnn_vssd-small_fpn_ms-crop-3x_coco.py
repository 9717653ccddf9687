_base_ = "../_base_/mask-rcnn_fpn_ms-crop-3x_coco.py"

model = dict(
    backbone=dict(type="VSSD", arch="vssd_small", drop_path_rate=0.4),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
