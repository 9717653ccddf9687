# DeiT's recipe, in float32. The published weights are the plain ones: there is no average of them.
_base_ = "imagenet_300e.py"

train_dataloader = dict(
    sampler=dict(_delete_=True, type="RepeatedAugmentationSampler"),
    dataset=dict(transform=dict(color_jitter=0.3)),
)

train_cfg = dict(max_epochs=310)
optim_wrapper = dict(clip_grad=None)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=5, end=300, eta_min=1e-5, convert_to_iter_based=True),
]

custom_hooks = []
