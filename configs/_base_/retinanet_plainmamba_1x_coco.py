# PlainMamba's RetinaNet: a ViT-Adapter's maps, and batch norms in the pyramid. A leaf names the model and its width.
_base_ = "retinanet_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="PlainMambaAdapter",
        init_cfg=dict(type="Pretrained", checkpoint="published"),
    ),
    neck=dict(start_level=1, add_extra_convs="on_output", norm_cfg=dict(type="SyncBN", requires_grad=True)),
)

optim_wrapper = dict(clip_grad=dict(max_norm=35.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]

# The maps of stride 4 are not read.
find_unused_parameters = True
