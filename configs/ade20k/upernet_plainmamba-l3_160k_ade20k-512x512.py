_base_ = "../_base_/upernet_160k_ade20k-512x512.py"

model = dict(
    # Four maps of stride 16: there is no pyramid.
    backbone=dict(type="PlainMamba", arch="plainmamba_l3", out_indices=(8, 17, 26, 35), drop_path_rate=0.3),
    decode_head=dict(in_channels=[448, 448, 448, 448]),
    auxiliary_head=dict(in_index=3, in_channels=448),
)
