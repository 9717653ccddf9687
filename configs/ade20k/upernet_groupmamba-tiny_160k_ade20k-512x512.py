_base_ = "../_base_/upernet_160k_ade20k-512x512.py"

model = dict(
    backbone=dict(type="GroupMamba", arch="groupmamba_tiny", drop_path_rate=0.05),
    decode_head=dict(in_channels=[64, 128, 348, 448]),
    auxiliary_head=dict(in_channels=348),
)
