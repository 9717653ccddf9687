# The recipe of the training logs, where the learning rate changes between epochs only.
_base_ = "imagenet_300e.py"

model = dict(network=dict(drop_path_rate=0.1), data_preprocessor=dict(mixup=dict(mixup_alpha=0.2)))
train_dataloader = dict(dataset=dict(transform=dict(auto_augment="rand-m9-mstd0.5")))

optim_wrapper = dict(optimizer=dict(lr=2e-3, weight_decay=0.04), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=5e-5, by_epoch=True, end=20),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=20, end=300, eta_min=1e-6),
]
auto_scale_lr = dict(base_batch_size=2048)
