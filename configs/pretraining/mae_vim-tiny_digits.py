# A masked autoencoder (MAE, arXiv:2111.06377) in place of SimMIM: the network gets the 9 visible patches of 36 alone, a
# transformer, which is thrown away afterwards, paints the rest.
_base_ = "simmim_vim-tiny_digits.py"

model = dict(ratio=0.75, visible_only=True, decoder=dict(depth=2))
