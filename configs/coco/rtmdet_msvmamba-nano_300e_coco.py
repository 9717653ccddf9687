_base_ = "../_base_/rtmdet_300e_coco.py"

model = dict(
    backbone=dict(type="MSVMamba", arch="msvmamba_nano", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384]),
)
