# The recipe of RTMDet's tiny model, for whoever looks for a one-stage, real-time detector ("YOLO") on a state-space
# backbone. It is not Mamba-YOLO, which is AGPL and of which nothing is used here. Nobody has trained these configs yet.
_base_ = [
    "models/rtmdet.py",
    "datasets/coco_mosaic.py",
    "schedules/rtmdet_300e.py",
    "mmdet_runtime.py",
]

default_hooks = dict(checkpoint=dict(interval=10))
custom_hooks = [
    dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum=2e-4, update_buffers=True, priority=49),
    dict(type="PipelineSwitchHook", switch_epoch=280, switch_pipeline=_base_.train_pipeline_stage2),
]
