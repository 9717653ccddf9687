# EfficientVMamba-T itself with narrow heads, for two CPU cores; from random weights.
_base_ = ["../_base_/models/upernet.py", "../_base_/mmseg_runtime.py"]

num_classes = 11
size = (64, 64)
norm_cfg = dict(type="BN", requires_grad=True)
widths = [48, 96, 192, 384]
# Nine of ten pixels are photograph.
loss = dict(class_weight=[0.1] + [1.0] * (num_classes - 1))

model = dict(
    data_preprocessor=dict(size=size),
    backbone=dict(_delete_=True, type="EfficientVMamba", arch="efficientvmamba_tiny"),
    decode_head=dict(in_channels=widths, channels=64, num_classes=num_classes, norm_cfg=norm_cfg, loss_decode=loss),
    auxiliary_head=dict(
        in_channels=widths[2], channels=64, num_classes=num_classes, norm_cfg=norm_cfg, loss_decode=loss
    ),
)

data_root = "data/digits_ade"
data_hint = "make it with: python tools/make_digits.py --task segmentation --out data/digits_ade"
# Pictures leave the background clear.
metainfo = dict(
    classes=("photograph", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
    background=("photograph",),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
test_pipeline = train_pipeline
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    worker_init_fn=dict(type="keep_worker_seed"),
    dataset=dict(
        type="BaseSegDataset",
        data_root=data_root,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        metainfo=metainfo,
        reduce_zero_label=True,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    worker_init_fn=dict(type="keep_worker_seed"),
    dataset=dict(
        type="BaseSegDataset",
        data_root=data_root,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        metainfo=metainfo,
        reduce_zero_label=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

train_cfg = dict(type="IterBasedTrainLoop", max_iters=550, val_interval=275)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="TimmOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, end=20),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=20, end=550, eta_min=4e-5),
]
auto_scale_lr = dict(base_batch_size=16)
default_hooks = dict(checkpoint=dict(interval=275))
