# Swin's recipe, which VMamba and MSVMamba follow. The originals train in float16: add --amp.
_base_ = [
    "datasets/imagenet.py",
    "schedules/imagenet_300e.py",
    "default_runtime.py",
]

model = dict(
    type="ImageClassifier",
    network=dict(num_classes=_base_.num_classes),
    loss=dict(type="SoftTargetCrossEntropy"),
    data_preprocessor=dict(
        type="ImagePreprocessor",
        mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode="batch", label_smoothing=0.1),
    ),
)

custom_hooks = [dict(type="EMAHook", momentum=1e-4, update_buffers=True)]
