# The recipe of the base model, the only one published: three stages, each from the weights of the one before.
# The first two augment by 3-Augment; the strength of its colour jitter is not stated, and timm's usual one here. The
# originals train in bfloat16: add --amp bfloat16.
_base_ = "imagenet_300e.py"

model = dict(
    network=dict(name="adventurer_base"),
    data_preprocessor=dict(mixup=dict(label_smoothing=0.0)),
)

train_dataloader = dict(
    dataset=dict(transform=dict(auto_augment="3a", re_prob=0.0)),
    sampler=dict(_delete_=True, type="RepeatedAugmentationSampler"),
)

optim_wrapper = dict(clip_grad=None)
custom_hooks = []
