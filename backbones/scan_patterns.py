"""The public door to :mod:`backbones.patterns`."""

from backbones.patterns import *  # noqa: F403
