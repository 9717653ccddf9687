_base_ = "../_base_/upernet_160k_ade20k-512x512.py"

model = dict(
    backbone=dict(type="VMamba", arch="vmamba_base_s2l15", drop_path_rate=0.6),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
