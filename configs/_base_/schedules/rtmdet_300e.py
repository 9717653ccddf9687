# 300 epochs at a total batch of 256; the rate falls in the second half. The last 20 see single images.
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=300, val_interval=10, dynamic_intervals=[(280, 1)])
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

optim_wrapper = dict(
    type="OptimWrapper",
    constructor="TimmOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=4e-3, betas=(0.9, 0.999), weight_decay=0.05),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-5, by_epoch=False, begin=0, end=1000),
    dict(
        type="CosineAnnealingLR",
        eta_min=2e-4,
        begin=150,
        end=300,
        T_max=150,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
auto_scale_lr = dict(base_batch_size=256)
