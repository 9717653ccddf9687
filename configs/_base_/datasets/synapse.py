# Slices of Synapse's abdominal CT volumes, nine classes, 224 x 224; tested volume by volume.
data_hint = "it must hold img_dir/ and ann_dir/, each with train/ and val/, as mmseg prepares Synapse; or set data_root"

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomRotFlip", rotate_prob=0.5, flip_prob=0.5, degree=20),
    dict(type="Resize", scale=(224, 224), keep_ratio=False),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(224, 224), keep_ratio=False),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=4,
    sampler=dict(type="DefaultSampler", shuffle=True),
    worker_init_fn=dict(type="keep_worker_seed"),
    dataset=dict(
        type="SynapseDataset",
        data_root="data/synapse",
        data_prefix=dict(img_path="img_dir/train", seg_map_path="ann_dir/train"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="SynapseDataset",
        data_root="data/synapse",
        data_prefix=dict(img_path="img_dir/val", seg_map_path="ann_dir/val"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
# mmseg's preparation names slices case0001_slice000.
val_evaluator = dict(type="VolumeMetric", volume=r"(?P<volume>case\d+)_slice(?P<slice>\d+)")
test_evaluator = val_evaluator
