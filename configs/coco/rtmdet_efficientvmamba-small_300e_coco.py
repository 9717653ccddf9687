_base_ = "../_base_/rtmdet_300e_coco.py"

model = dict(
    backbone=dict(type="EfficientVMamba", arch="efficientvmamba_small", drop_path_rate=0.1),
    neck=dict(in_channels=[128, 256, 512]),
)
