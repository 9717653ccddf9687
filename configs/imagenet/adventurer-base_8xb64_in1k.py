# The third stage, at a rate that only warms up. Random erasing is not stated for it, and DeiT's here.
_base_ = "../_base_/imagenet_adventurer.py"

model = dict(
    network=dict(drop_path_rate=0.6),
    data_preprocessor=dict(mixup=dict(label_smoothing=0.1)),
    init_cfg=dict(type="Pretrained", checkpoint="work_dirs/adventurer-base_8xb128_in1k-stage2/epoch_100.pth"),
)

train_dataloader = dict(
    batch_size=64,
    dataset=dict(transform=dict(auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25)),
    sampler=dict(_delete_=True, type="DefaultSampler", shuffle=True),
)

train_cfg = dict(max_epochs=20)
optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=0.1))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=5, end=20, eta_min=1e-5, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=512)
