# The schedule of SimMIM (arXiv:2111.09886) in the configuration of OpenMMLab for Swin-B: 100 epochs, 10 of them to warm
# up, at a total batch of 2,048.
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=100)

optim_wrapper = dict(
    type="OptimWrapper",
    constructor="TimmOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=8e-4, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=5e-3, by_epoch=True, end=10, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=10, end=100, eta_min=4e-5, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=2048)
