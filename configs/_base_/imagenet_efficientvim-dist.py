# Hard distillation from a RegNetY-16GF, in place of the averaged teacher.
_base_ = "imagenet_efficientvim.py"

model = dict(
    type="HardDistillation",
    teacher=dict(name="regnety_160", checkpoint="https://dl.fbaipublicfiles.com/deit/regnety_160-a5fe301d.pth"),
    alpha=0.5,
)
custom_hooks = [dict(type="EMAHook", momentum=5e-4, update_buffers=True)]
