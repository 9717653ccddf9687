_base_ = "../_base_/imagenet_300e.py"

model = dict(network=dict(name="msvmambav3_base", drop_path_rate=0.5))

optim_wrapper = dict(optimizer=dict(lr=6e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=1 / 600, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=20, end=300, eta_min=6e-6, convert_to_iter_based=True),
]
