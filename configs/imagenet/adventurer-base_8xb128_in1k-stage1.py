# Small images first.
_base_ = "../_base_/imagenet_adventurer.py"

model = dict(network=dict(img_size=128, drop_path_rate=0.1))

train_dataloader = dict(dataset=dict(transform=dict(input_size=128)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=128)))
test_dataloader = val_dataloader

param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=5, end=300, eta_min=1e-5, convert_to_iter_based=True),
]
