_base_ = "../_base_/imagenet_plainmamba.py"

model = dict(network=dict(name="plainmamba_l3", drop_path_rate=0.4))

optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=20, end=300, eta_min=1e-5, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=1024)
