_base_ = "default_runtime.py"

default_scope = "mmdet"
default_hooks = dict(checkpoint=dict(save_best="coco/bbox_mAP"))
visualizer = dict(type="DetLocalVisualizer")
