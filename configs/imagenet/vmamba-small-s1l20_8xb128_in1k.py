_base_ = "../_base_/imagenet_300e.py"

model = dict(network=dict(name="vmamba_small_s1l20", drop_path_rate=0.3))
