_base_ = "../_base_/imagenet_simmim.py"

model = dict(network=dict(name="vim_tiny", img_size=192))
