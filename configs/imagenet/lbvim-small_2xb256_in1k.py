_base_ = "../_base_/imagenet_vim.py"

model = dict(network=dict(name="lbvim_small", drop_path_rate=0.05))

train_dataloader = dict(batch_size=256)
auto_scale_lr = dict(base_batch_size=512)
