# PlainMamba's recipe, here for L2, in float32.
_base_ = "imagenet_300e.py"

train_dataloader = dict(batch_size=256, dataset=dict(transform=dict(auto_augment="rand-m9-mstd0.5-inc1")))

optim_wrapper = dict(optimizer=dict(lr=2e-3), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=20, end=300, eta_min=2e-5, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=2048)
