_base_ = "../_base_/cascade-mask-rcnn_simple-fpn_100e_coco-lsj.py"

model = dict(
    backbone=dict(type="Vim", arch="vim_tiny", drop_path_rate=0.1, tap="stream", out_norm=False),
    neck=dict(in_channels=192),
)

optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.837))
