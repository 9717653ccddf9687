_base_ = "../_base_/upernet_160k_ade20k-512x512.py"

model = dict(
    backbone=dict(type="Vim", arch="vim_tiny", drop_path_rate=0.1, out_norm=False),
    neck=dict(type="Feature2Pyramid", embed_dim=192, rescales=[4, 2, 1, 0.5], norm_cfg=_base_.norm_cfg),
    decode_head=dict(in_channels=[192, 192, 192, 192], channels=192),
    auxiliary_head=dict(in_channels=192),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)

train_dataloader = dict(batch_size=8)
train_cfg = dict(max_iters=60000, val_interval=6000)
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=0.1))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=60000),
]
auto_scale_lr = dict(base_batch_size=32)
default_hooks = dict(checkpoint=dict(interval=6000))
