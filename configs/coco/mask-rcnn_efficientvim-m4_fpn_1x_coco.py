# The maps have strides 16 to 64: two finer levels are made of the first. Batch norms keep their statistics.
_base_ = "../_base_/mask-rcnn_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        type="EfficientViM",
        arch="efficientvim_m4",
        norm_eval=True,
        init_cfg=dict(checkpoint="published:efficientvim_m4.e450_in1k"),
    ),
    neck=dict(type="FinerFPN", in_channels=[224, 320, 512], finer=2),
)

train_dataloader = dict(batch_size=16)

# All that is no vector of the mixers decays, as in the authors' detectors.
optim_wrapper = dict(optimizer=dict(lr=2e-4), paramwise_cfg=dict(norm_decay_mult=1.0, bias_decay_mult=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
