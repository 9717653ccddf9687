_base_ = "../_base_/imagenet_300e.py"

model = dict(network=dict(name="vanilla_vmamba_small", drop_path_rate=0.3))
