_base_ = "../_base_/imagenet_efficientvmamba.py"

model = dict(network=dict(name="efficientvmamba_base"))

train_dataloader = dict(batch_size=64)
auto_scale_lr = dict(base_batch_size=1024)
