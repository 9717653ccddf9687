_base_ = "../_base_/imagenet_300e.py"

model = dict(network=dict(name="vmamba_tiny_s2l5", drop_path_rate=0.2))
