_base_ = "../_base_/imagenet_groupmamba.py"

model = dict(network=dict(name="groupmamba_tiny"))
