_base_ = "../_base_/imagenet_vim.py"

model = dict(network=dict(name="vim_tiny"))

optim_wrapper = dict(optimizer=dict(weight_decay=0.1))
