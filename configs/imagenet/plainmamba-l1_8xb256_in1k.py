# Trained in float16: add --amp. Without averaged weights.
_base_ = "../_base_/imagenet_plainmamba.py"

model = dict(network=dict(name="plainmamba_l1", drop_path_rate=0.2))

optim_wrapper = dict(clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=15, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=15, end=300, eta_min=2e-5, convert_to_iter_based=True),
]
custom_hooks = []
