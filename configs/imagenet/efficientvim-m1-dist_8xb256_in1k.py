_base_ = "../_base_/imagenet_efficientvim-dist.py"

model = dict(network=dict(name="efficientvim_m1_dist"))
