# 14 labelled images of each digit, a tenth of them. Give the pre-trained weights on the command line:
# --cfg-options model.init_cfg.type=Pretrained model.init_cfg.checkpoint=FILE model.init_cfg.headless=True
_base_ = "../digits/vim-tiny_digits.py"

# Mean pooling, as pre-training teaches the patches and not the class token.
model = dict(network=dict(patch_size=4, embed_dim=96, depth=4, global_pool="avg"))

train_dataloader = dict(batch_size=20, dataset=dict(per_class=14))
train_cfg = dict(max_epochs=40, val_interval=40)
auto_scale_lr = dict(base_batch_size=20)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=True, end=4, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=4, end=40, eta_min=1e-5, convert_to_iter_based=True),
]
