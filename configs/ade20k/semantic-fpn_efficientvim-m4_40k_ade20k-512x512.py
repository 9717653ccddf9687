# The neck's fourth map, of stride 128, is pooled from the third. Batch norms of the backbone keep their statistics.
# The authors resize test images up to multiples of 32; here any size runs.
_base_ = "../_base_/semantic-fpn_40k_ade20k-512x512.py"

model = dict(
    backbone=dict(
        type="EfficientViM",
        arch="efficientvim_m4",
        norm_eval=True,
        init_cfg=dict(checkpoint="published:efficientvim_m4.e450_in1k"),
    ),
    neck=dict(in_channels=[224, 320, 512]),
    decode_head=dict(feature_strides=[16, 32, 64, 128]),
)
