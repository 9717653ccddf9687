_base_ = "../_base_/upernet_160k_ade20k-512x512.py"

model = dict(
    # Layer norms start from the scales of the RMS norms that the published models were pretrained with.
    backbone=dict(type="LBVim", arch="lbvim_tiny", drop_path_rate=0.1, norm_layer="layernorm"),
    neck=dict(type="Feature2Pyramid", embed_dim=192, rescales=[4, 2, 1, 0.5], norm_cfg=_base_.norm_cfg),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
