_base_ = "../_base_/imagenet_spatialmamba.py"

model = dict(network=dict(name="spatialmamba_small", drop_path_rate=0.3), weight=1.5)
