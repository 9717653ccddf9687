# MSVM-UNet on Synapse: VMamba-T (s1l8) with the published weights, AdamW 5e-4, one cosine.
_base_ = ["../_base_/models/unet.py", "../_base_/datasets/synapse.py", "../_base_/unet_runtime.py"]

model = dict(
    data_preprocessor=dict(size=(224, 224)),
    backbone=dict(
        type="VMamba",
        arch="vmamba_tiny_s1l8",
        drop_path_rate=0.2,
        out_norm=False,
        init_cfg=dict(type="Pretrained", checkpoint="published"),
    ),
    decode_head=dict(
        in_channels=[96, 192, 384, 768],
        up="lkpe",
        block="multi_scale",
        drop_path_rate=0.2,
        num_classes=9,
        loss_decode=[dict(type="CrossEntropyLoss"), dict(type="BatchDiceLoss")],
    ),
)
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="TimmOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=5e-4, betas=(0.9, 0.999), weight_decay=1e-3),
)
param_scheduler = [dict(type="CosineAnnealingLR", T_max=300, eta_min=1e-6, by_epoch=True, begin=0, end=300)]
auto_scale_lr = dict(base_batch_size=32)
default_hooks = dict(checkpoint=dict(save_best="Dice", rule="greater"))
