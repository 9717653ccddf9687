_base_ = "../_base_/imagenet_plainmamba.py"

model = dict(network=dict(name="plainmamba_l2", drop_path_rate=0.2))
