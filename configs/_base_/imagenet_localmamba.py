# LocalMamba's recipe, in float32 and without averaged weights. LocalVMamba's authors trained in float16: add --amp.
_base_ = "imagenet_300e.py"

model = dict(
    network=dict(drop_path_rate=0.1),
    data_preprocessor=dict(mixup=dict(mixup_alpha=0.2)),
)

train_dataloader = dict(dataset=dict(transform=dict(auto_augment="rand-m9-mstd0.5", color_jitter=0.3)))

optim_wrapper = dict(optimizer=dict(weight_decay=0.04), clip_grad=None)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-4, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=20, end=300, eta_min=1e-6, convert_to_iter_based=True),
]

custom_hooks = []
