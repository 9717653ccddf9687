"""What a model is given instead of a finished layer."""

from collections.abc import Callable

from torch import nn

Constructor = Callable[..., nn.Module]
