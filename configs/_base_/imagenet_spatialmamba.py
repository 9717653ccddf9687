# From epoch 75 the averaged model teaches as well (MESA). Keep to float32 or --amp bfloat16.
_base_ = "imagenet_300e.py"

model = dict(type="SelfDistillation")
custom_hooks = [dict(type="SelfDistillationHook", start_epoch=75, momentum=1e-4)]
