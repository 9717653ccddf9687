_base_ = "../_base_/imagenet_efficientvim.py"

model = dict(network=dict(name="efficientvim_m3"), weight=1.0)
