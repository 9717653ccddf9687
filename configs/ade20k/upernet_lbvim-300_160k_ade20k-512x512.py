_base_ = "upernet_lbvim-tiny_160k_ade20k-512x512.py"

model = dict(
    backbone=dict(arch="lbvim_300"),
    neck=dict(embed_dim=300),
    decode_head=dict(in_channels=[300, 300, 300, 300]),
    auxiliary_head=dict(in_channels=300),
)
