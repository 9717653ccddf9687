_base_ = "../_base_/imagenet_simmim.py"

model = dict(network=dict(name="vmamba_tiny_s1l8"))
