_base_ = "../_base_/imagenet_vim.py"

model = dict(network=dict(name="lbvim_528", drop_path_rate=0.05))

auto_scale_lr = dict(base_batch_size=512)
