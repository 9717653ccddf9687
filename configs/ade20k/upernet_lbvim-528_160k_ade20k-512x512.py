_base_ = "upernet_lbvim-tiny_160k_ade20k-512x512.py"

model = dict(
    backbone=dict(arch="lbvim_528"),
    neck=dict(embed_dim=528),
    decode_head=dict(in_channels=[528, 528, 528, 528]),
    auxiliary_head=dict(in_channels=528),
)
