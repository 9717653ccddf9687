"""mmengine's Runner, hooks, optimizers, metrics and checkpoints, as this library needs them."""
