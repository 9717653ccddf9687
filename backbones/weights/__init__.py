"""From a weight file to a model: where it is, what it holds, how its names and layouts become ours, and the check."""

from backbones.weights.files import WEIGHT_KEYS, Weights
from backbones.weights.rules import ONE_ORDER, SAME, SQUEEZE_1, CheckpointError, KeyRule, Layout, StateDict

__all__ = [
    "ONE_ORDER",
    "SAME",
    "SQUEEZE_1",
    "WEIGHT_KEYS",
    "CheckpointError",
    "KeyRule",
    "Layout",
    "StateDict",
    "Weights",
]
