_base_ = "../_base_/imagenet_vim.py"

model = dict(network=dict(name="lbvim_300", drop_path_rate=0.05))

optim_wrapper = dict(optimizer=dict(lr=2e-3))
