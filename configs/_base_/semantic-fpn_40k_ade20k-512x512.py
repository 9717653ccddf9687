_base_ = [
    "models/semantic-fpn.py",
    "datasets/ade20k.py",
    "schedules/ade20k_40k.py",
    "mmseg_runtime.py",
]

train_dataloader = dict(batch_size=4)
default_hooks = dict(checkpoint=dict(interval=4000))
