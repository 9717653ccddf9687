# A narrow, shallow Vim on patches of 4 x 4 pixels, 36 to an image. vim-tiny-patch4_digits.py goes on with its weights.
_base_ = [
    "../_base_/datasets/digits.py",
    "../_base_/schedules/adamw_cosine_6e.py",
    "../_base_/default_runtime.py",
]

model = dict(
    type="MaskedImageModelling",
    network=dict(name="vim_tiny", img_size=24, patch_size=4, embed_dim=96, depth=4),
    ratio=0.6,
)

train_dataloader = dict(batch_size=32)
val_dataloader = None
val_cfg = None
val_evaluator = None
test_dataloader = None
test_cfg = None
test_evaluator = None

train_cfg = dict(_delete_=True, type="EpochBasedTrainLoop", max_epochs=20)
auto_scale_lr = dict(base_batch_size=32)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=True, end=2, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=2, end=20, eta_min=1e-5, convert_to_iter_based=True),
]

default_hooks = dict(checkpoint=dict(save_best=None))
custom_hooks = [dict(type="ReconstructionHook")]
