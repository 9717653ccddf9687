_base_ = "../_base_/cascade-mask-rcnn_simple-fpn_100e_coco-lsj.py"

model = dict(
    backbone=dict(type="LBVim", arch="lbvim_tiny", drop_path_rate=0.1),
    neck=dict(in_channels=192),
    roi_head=dict(bbox_head=[dict(head, reg_class_agnostic=False) for head in _base_.model.roi_head.bbox_head]),
)

train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(weight_decay=0.05), clip_grad=dict(max_norm=35))
auto_scale_lr = dict(base_batch_size=32)
