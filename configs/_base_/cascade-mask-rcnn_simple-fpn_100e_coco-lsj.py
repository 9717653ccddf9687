_base_ = [
    "models/cascade-mask-rcnn_simple-fpn.py",
    "datasets/coco_lsj.py",
    "schedules/vitdet_100e.py",
    "mmdet_runtime.py",
]

default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=5000),
)
log_processor = dict(by_epoch=False)
