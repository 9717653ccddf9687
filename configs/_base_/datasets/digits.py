# 1,438 training and 359 validation images of handwritten digits.
data_hint = "make it with: python tools/make_digits.py --out data/digits"

num_classes = 10

train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    dataset=dict(
        type="ImageFolder",
        data_root="data/digits",
        split="train",
        num_classes=num_classes,
        # Digits are shifted and scaled a little, never mirrored.
        transform=dict(
            input_size=24,
            is_training=True,
            train_crop_mode="rkrr",
            scale=(0.8, 1.0),
            ratio=(0.9, 1.1),
            hflip=0.0,
            color_jitter=None,
            interpolation="bilinear",
        ),
    ),
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="collate_images"),
    worker_init_fn=dict(type="keep_worker_seed"),
    drop_last=True,
)

val_dataloader = dict(
    batch_size=90,
    num_workers=0,
    dataset=dict(
        type="ImageFolder",
        data_root="data/digits",
        split="val",
        num_classes=num_classes,
        transform=dict(input_size=24, crop_pct=1.0, interpolation="bilinear"),
    ),
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="collate_images"),
    worker_init_fn=dict(type="keep_worker_seed"),
)
test_dataloader = val_dataloader

val_evaluator = dict(type="ClassificationMetric", topk=(1, 5))
test_evaluator = val_evaluator
