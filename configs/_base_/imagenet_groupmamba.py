# Hard distillation from a RegNetY-16GF.
_base_ = "imagenet_300e.py"

model = dict(
    type="HardDistillation",
    network=dict(drop_path_rate=0.05),
    teacher=dict(name="regnety_160", checkpoint="https://dl.fbaipublicfiles.com/deit/regnety_160-a5fe301d.pth"),
    alpha=0.5,
)
