_base_ = "../_base_/imagenet_efficientvim-dist.py"

model = dict(network=dict(name="efficientvim_m4_dist"))
train_dataloader = dict(dataset=dict(transform=dict(input_size=256)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=256)))
test_dataloader = val_dataloader
