# VM-UNet on ISIC: BCE and Dice. The authors begin with weights of VMamba-S.
_base_ = ["../_base_/vm-unet_300e.py", "../_base_/datasets/isic.py"]

model = dict(
    decode_head=dict(
        num_classes=2,
        out_channels=1,
        threshold=0.5,
        loss_decode=[
            dict(type="CrossEntropyLoss", use_sigmoid=True, loss_name="loss_bce"),
            dict(type="BinaryDiceLoss"),
        ],
    ),
)
