_base_ = "../_base_/imagenet_spatialmamba.py"

model = dict(network=dict(name="spatialmamba_base", drop_path_rate=0.5), weight=2.0)
