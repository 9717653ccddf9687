_base_ = "../_base_/imagenet_efficientvmamba.py"

model = dict(network=dict(name="efficientvmamba_tiny"))
