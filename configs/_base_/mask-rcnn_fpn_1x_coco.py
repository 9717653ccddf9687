_base_ = [
    "models/mask-rcnn_fpn.py",
    "datasets/coco.py",
    "schedules/coco_1x.py",
    "mmdet_runtime.py",
]
