_base_ = "../_base_/imagenet_adventurer.py"

model = dict(
    network=dict(drop_path_rate=0.4),
    init_cfg=dict(type="Pretrained", checkpoint="work_dirs/adventurer-base_8xb128_in1k-stage1/epoch_300.pth"),
)

train_cfg = dict(max_epochs=100)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=5, end=100, eta_min=1e-5, convert_to_iter_based=True),
]
