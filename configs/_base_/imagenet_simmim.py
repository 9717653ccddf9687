# SimMIM (arXiv:2111.09886): crops of at least two thirds, mirrored or not, and no other augmentation. Pre-training has
# no labels, so there is nothing to validate, and the newest checkpoints are kept.
_base_ = ["datasets/imagenet.py", "schedules/simmim_100e.py", "default_runtime.py"]

model = dict(type="MaskedImageModelling", ratio=0.6)

train_dataloader = dict(
    batch_size=256,
    dataset=dict(
        transform=dict(
            _delete_=True,
            input_size=192,
            is_training=True,
            scale=(0.67, 1.0),
            color_jitter=None,
            interpolation="bicubic",
        ),
    ),
)
val_dataloader = None
val_cfg = None
val_evaluator = None
test_dataloader = None
test_cfg = None
test_evaluator = None

default_hooks = dict(checkpoint=dict(save_best=None))
custom_hooks = [dict(type="ReconstructionHook")]
