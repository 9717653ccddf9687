_base_ = "../_base_/imagenet_300e.py"

model = dict(network=dict(name="vmamba_base_s2l15", drop_path_rate=0.6))
