_base_ = "../_base_/upernet_160k_ade20k-512x512.py"

model = dict(
    # Layer norms start from the scales of the RMS norms that the published models were pretrained with.
    backbone=dict(
        type="LocalVim",
        arch="localvim_tiny",
        out_indices=(4, 9, 14, 19),
        drop_path_rate=0.1,
        norm_layer="layernorm",
    ),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192, in_index=3),
)
