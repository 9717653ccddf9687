_base_ = "../_base_/imagenet_vim.py"

model = dict(network=dict(name="lbvim_300", drop_path_rate=0.05))

optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=5e-4, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=5, end=300, eta_min=1e-5, convert_to_iter_based=True),
]
