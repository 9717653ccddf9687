_base_ = "../_base_/imagenet_vim.py"

model = dict(network=dict(name="lbvim_tiny", drop_path_rate=0.05))

train_dataloader = dict(batch_size=512)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
