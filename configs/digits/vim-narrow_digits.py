# A narrow, shallow Vim on patches of 4 x 4 pixels, whose 37 tokens are enough to lose some:
# --cfg-options model.network.token_reduction.schedule="{1:0.8,2:0.8,3:0.8}"
_base_ = "vim-tiny_digits.py"

model = dict(network=dict(patch_size=4, embed_dim=96, depth=4))
