_base_ = "../_base_/upernet_160k_ade20k-512x512.py"

model = dict(
    backbone=dict(type="VSSD", arch="vssd_micro"),
    decode_head=dict(in_channels=[48, 96, 192, 384]),
    auxiliary_head=dict(in_channels=192),
)
