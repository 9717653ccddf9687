_base_ = "default_runtime.py"

default_scope = "mmseg"
default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=16000, save_best="mIoU"),
)
log_processor = dict(by_epoch=False)
visualizer = dict(type="SegLocalVisualizer")
