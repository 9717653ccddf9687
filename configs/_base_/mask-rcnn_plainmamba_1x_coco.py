# PlainMamba's Mask R-CNN: a ViT-Adapter's maps, and batch norms in pyramid and box head. A leaf names the model and its
# width.
_base_ = "mask-rcnn_fpn_1x_coco.py"

norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    backbone=dict(type="PlainMambaAdapter"),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=norm_cfg)),
)

param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
