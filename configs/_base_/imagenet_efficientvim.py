# A total batch of 2,048. From epoch 75 the averaged model teaches as well (MESA); in the authors'
# runs of 450 epochs, from 112. The originals train in float16: add --amp.
_base_ = "imagenet_300e.py"

model = dict(type="SelfDistillation")
train_dataloader = dict(batch_size=256)

train_cfg = dict(max_epochs=310)  # the last 10 at the smallest rate
optim_wrapper = dict(optimizer=dict(lr=2e-3), clip_grad=dict(max_norm=0.02))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=20, end=300, eta_min=2e-5, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=2048)

custom_hooks = [dict(type="SelfDistillationHook", start_epoch=75, momentum=5e-4)]
