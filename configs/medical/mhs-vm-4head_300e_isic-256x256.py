# MHS-VM, four heads; the threshold is 0.5 for ISIC 2018, 0 for ISIC 2017.
_base_ = "vm-unet_300e_isic-256x256.py"

patterns = ["snake", "diagonal", "spiral_corners", "cross"]
threshold = 0.5
model = dict(
    backbone=dict(model_args=dict(heads=patterns, threshold=threshold)),
    decode_head=dict(block="multi_head", block_args=dict(patterns=patterns, threshold=threshold)),
)
