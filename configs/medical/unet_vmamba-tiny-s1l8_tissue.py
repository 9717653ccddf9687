# A narrow VMamba as the encoder of a U-Net, for two CPU cores; from random weights.
_base_ = ["../_base_/models/unet.py", "../_base_/mmseg_unet_runtime.py"]

widths = [32, 64, 96, 128]
model = dict(
    data_preprocessor=dict(size=(96, 96), test_cfg=dict(size_divisor=32)),
    backbone=dict(type="VMamba", arch="vmamba_tiny_s1l8", model_args=dict(dims=widths, depths=(1, 1, 1, 1))),
    decode_head=dict(
        in_channels=widths,
        depths=(0, 1, 1, 1),
        num_classes=2,
        out_channels=1,
        threshold=0.5,
        loss_decode=[
            dict(type="CrossEntropyLoss", use_sigmoid=True, loss_name="loss_bce"),
            dict(type="BinaryDiceLoss"),
        ],
    ),
)

data_root = "data/tissue"
data_hint = "make it with: python tools/make_tissue.py --out data/tissue"
metainfo = dict(classes=("ground", "epithelium"), palette=[[0, 0, 0], [255, 200, 0]], background=("ground",))

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="RandomFlip", prob=0.5, direction="vertical"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    worker_init_fn=dict(type="keep_worker_seed"),
    dataset=dict(
        type="BaseSegDataset",
        data_root=data_root,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        img_suffix=".png",
        metainfo=metainfo,
        reduce_zero_label=False,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    worker_init_fn=dict(type="keep_worker_seed"),
    dataset=dict(
        type="BaseSegDataset",
        data_root=data_root,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        img_suffix=".png",
        metainfo=metainfo,
        reduce_zero_label=False,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="VolumeMetric")
test_evaluator = val_evaluator

train_cfg = dict(type="IterBasedTrainLoop", max_iters=150, val_interval=50)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="TimmOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, end=20),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=20, end=150, eta_min=2e-5),
]
auto_scale_lr = dict(base_batch_size=8)
default_hooks = dict(checkpoint=dict(interval=50, save_best="Dice", rule="greater"))
