# ImageNet-1K in folders of classes, augmented as in the recipes of DeiT and Swin.
data_hint = "it must hold train/ and val/ with a folder for each of the 1,000 classes; or set data_root"

num_classes = 1000

train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    pin_memory=True,
    dataset=dict(
        type="ImageFolder",
        data_root="data/imagenet",
        split="train",
        num_classes=num_classes,
        transform=dict(
            input_size=224,
            is_training=True,
            auto_augment="rand-m9-mstd0.5-inc1",
            interpolation="bicubic",
            re_prob=0.25,
            re_mode="pixel",
        ),
    ),
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="collate_images"),
    worker_init_fn=dict(type="keep_worker_seed"),
    drop_last=True,
)

val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    pin_memory=True,
    dataset=dict(
        type="ImageFolder",
        data_root="data/imagenet",
        split="val",
        num_classes=num_classes,
        transform=dict(input_size=224, crop_pct=0.875, interpolation="bicubic"),
    ),
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="collate_images"),
    worker_init_fn=dict(type="keep_worker_seed"),
)
test_dataloader = val_dataloader

val_evaluator = dict(type="ClassificationMetric", topk=(1, 5))
test_evaluator = val_evaluator
