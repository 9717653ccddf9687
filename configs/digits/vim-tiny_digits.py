_base_ = [
    "../_base_/datasets/digits.py",
    "../_base_/schedules/adamw_cosine_6e.py",
    "../_base_/default_runtime.py",
]

model = dict(
    type="ImageClassifier",
    network=dict(name="vim_tiny", img_size=24, patch_size=8, num_classes=_base_.num_classes),
    loss=dict(type="LabelSmoothingCrossEntropy", smoothing=0.1),
)
