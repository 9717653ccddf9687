# Skin lesions of ISIC 2017 or 2018, 256 x 256, binary.
data_hint = (
    "it must hold images/ and masks/, each with training/ and validation/, as ISIC names its files; or set data_root"
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadMask"),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="RandomFlip", prob=0.5, direction="vertical"),
    dict(type="RandomRotate", prob=0.5, degree=360.0, seg_pad_val=0),
    dict(type="Resize", scale=(256, 256), keep_ratio=False),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadMask"),
    dict(type="Resize", scale=(256, 256), keep_ratio=False),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=4,
    sampler=dict(type="DefaultSampler", shuffle=True),
    worker_init_fn=dict(type="keep_worker_seed"),
    dataset=dict(
        type="ISICDataset",
        data_root="data/isic",
        data_prefix=dict(img_path="images/training", seg_map_path="masks/training"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="ISICDataset",
        data_root="data/isic",
        data_prefix=dict(img_path="images/validation", seg_map_path="masks/validation"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
# Over all pixels of the set, as the papers count; the table in the log has the lesion's own row.
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU", "mDice"])
test_evaluator = val_evaluator
