_base_ = "../_base_/imagenet_efficientvim.py"

model = dict(network=dict(name="efficientvim_m4"), weight=1.0)
train_dataloader = dict(dataset=dict(transform=dict(input_size=256)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=256)))
test_dataloader = val_dataloader
