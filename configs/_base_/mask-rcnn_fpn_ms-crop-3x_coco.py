_base_ = [
    "models/mask-rcnn_fpn.py",
    "datasets/coco_ms-crop.py",
    "schedules/coco_3x.py",
    "mmdet_runtime.py",
]
