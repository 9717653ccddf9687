# A U-Net on any backbone with four maps. A leaf names the backbone, the widths of its maps and the task.
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        size=(256, 256),
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
    ),
    decode_head=dict(type="UNetHead"),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
