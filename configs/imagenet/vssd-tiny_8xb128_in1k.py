_base_ = "../_base_/imagenet_300e.py"

model = dict(network=dict(name="vssd_tiny", drop_path_rate=0.2))
