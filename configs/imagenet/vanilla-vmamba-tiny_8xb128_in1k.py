_base_ = "../_base_/imagenet_300e.py"

model = dict(network=dict(name="vanilla_vmamba_tiny", drop_path_rate=0.1))

# The only one of its family whose weights were not averaged.
custom_hooks = []
