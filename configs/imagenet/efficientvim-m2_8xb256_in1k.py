_base_ = "../_base_/imagenet_efficientvim.py"

model = dict(network=dict(name="efficientvim_m2"), weight=1.0)
