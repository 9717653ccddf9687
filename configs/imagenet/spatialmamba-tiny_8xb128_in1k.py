_base_ = "../_base_/imagenet_spatialmamba.py"

model = dict(network=dict(name="spatialmamba_tiny", drop_path_rate=0.2), weight=1.0)
