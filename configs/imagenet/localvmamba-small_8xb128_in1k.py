_base_ = "../_base_/imagenet_localmamba.py"

model = dict(network=dict(name="localvmamba_small"))
