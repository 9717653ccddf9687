# Fine-tuned from the model with patches that do not overlap, at a constant learning rate.
_base_ = "../_base_/imagenet_vim.py"

model = dict(
    network=dict(name="vim_small_stride8"),
    init_cfg=dict(type="Pretrained", checkpoint="published:vim_small"),
)

train_cfg = dict(max_epochs=30)
optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8))
param_scheduler = []
