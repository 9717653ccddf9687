_base_ = "../_base_/upernet_160k_ade20k-512x512.py"

model = dict(
    # Four maps of stride 16: there is no pyramid.
    backbone=dict(type="PlainMamba", arch="plainmamba_l2", drop_path_rate=0.2),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_index=3, in_channels=384),
)
