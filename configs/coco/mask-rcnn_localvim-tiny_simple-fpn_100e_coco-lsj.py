_base_ = "../_base_/mask-rcnn_simple-fpn_100e_coco-lsj.py"

model = dict(
    # Layer norms start from the scales of the RMS norms that the published models were pretrained with.
    backbone=dict(type="LocalVim", arch="localvim_tiny", out_indices=(19,), drop_path_rate=0.1, norm_layer="layernorm"),
    neck=dict(in_channels=192),
)

train_dataloader = dict(batch_size=2)
optim_wrapper = dict(optimizer=dict(weight_decay=0.05), clip_grad=dict(max_norm=35))
auto_scale_lr = dict(base_batch_size=16)
