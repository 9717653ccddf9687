# VM-UNet: AdamW 1e-3, half-waves of 50 epochs. A leaf names the data set, the classes and the losses.
_base_ = ["models/unet.py", "unet_runtime.py"]

model = dict(
    backbone=dict(
        type="VMamba",
        arch="vanilla_vmamba_tiny",
        drop_path_rate=0.2,
        out_norm=False,
        taps="input",
        model_args=dict(depths=(2, 2, 2, 2)),
    ),
    decode_head=dict(
        in_channels=[96, 192, 384, 768, 768],
        merge="add_before",
        block="vanilla",
        depths=(2, 2, 2, 1),
        out_dim=24,
        drop_path_rate=0.2,
    ),
)
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="TimmOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-2),
)
param_scheduler = [dict(type="CosineAnnealingLR", T_max=50, eta_min=1e-5, by_epoch=True, begin=0, end=300)]
auto_scale_lr = dict(base_batch_size=32)
