"""Constructors, which models take in place of finished layers."""

from collections.abc import Callable

from torch import nn

Constructor = Callable[..., nn.Module]
