# VM-UNet on Synapse: nine classes, cross entropy and Dice of the batch.
_base_ = ["../_base_/vm-unet_300e.py", "../_base_/datasets/synapse.py"]

model = dict(
    data_preprocessor=dict(size=(224, 224)),
    decode_head=dict(
        num_classes=9,
        loss_decode=[dict(type="CrossEntropyLoss"), dict(type="BatchDiceLoss")],
    ),
)
default_hooks = dict(checkpoint=dict(save_best="Dice", rule="greater"))
