"""Names that originals share: MSVMamba's and EfficientVMamba's grew out of VMamba, VSSD's shell is Spatial-Mamba's.

A family joins the tables of its own layers; the first rule that fits a name wins, so ``BLOCKS`` comes last.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from backbones.weights import KeyRule, Layout


def grouped(*shape: int) -> Layout:
    """Splits a first axis that holds one group after the other, (k c, ...), into (k, c, ...) with ``shape`` = k, -1."""
    return Layout(lambda x: x.unflatten(0, shape), lambda x: x.flatten(0, len(shape) - 1))


def _without_kernel(weight: Tensor) -> Tensor:
    return weight.squeeze((2, 3)) if weight.shape[2:] == torch.Size([1, 1]) else weight


LINEAR = Layout(_without_kernel, lambda x: x)  # stored as (o, i), or as a 1 x 1 convolution in some files
POINTWISE = Layout(_without_kernel, lambda x: x[:, :, None, None])  # stored as a 1 x 1 convolution

PATCH_STEM = (
    KeyRule("patch_embed.0.{}", "stem.proj.{}"),
    KeyRule("patch_embed.2.{}", "stem.norm.{}"),
    KeyRule("patch_embed.proj.{}", "stem.proj.{}"),  # names of January 2024
    KeyRule("patch_embed.norm.{}", "stem.norm.{}"),
)
RESIDUAL_STEM = (  # Spatial-Mamba's and VSSD's stem and downsampling
    KeyRule("patch_embed.{*}.norm.{}", "stem.{*}.bn.{}"),
    KeyRule("patch_embed.{*}", "stem.{*}"),
    KeyRule("layers.{}.downsample.conv.0.conv.{}", "downsamples.{}.expand.{}"),
    KeyRule("layers.{}.downsample.conv.1.conv.{}", "downsamples.{}.conv.{}"),
    KeyRule("layers.{}.downsample.conv.2.conv.{}", "downsamples.{}.reduce.conv.{}"),
    KeyRule("layers.{}.downsample.conv.2.norm.{}", "downsamples.{}.reduce.bn.{}"),
)
CONV_STEM = (
    KeyRule("patch_embed.0.{}", "stem.conv1.{}"),
    KeyRule("patch_embed.2.{}", "stem.norm1.{}"),
    KeyRule("patch_embed.5.{}", "stem.conv2.{}"),
    KeyRule("patch_embed.7.{}", "stem.norm2.{}"),
)
PATCH_MERGING = (
    KeyRule("layers.{}.downsample.norm.{}", "downsamples.{}.norm.{}"),
    KeyRule("layers.{}.downsample.reduction.weight", "downsamples.{}.reduction.weight", LINEAR),
    KeyRule("layers.{}.downsample.1.{}", "downsamples.{}.norm.{}"),  # VMamba's single file
    KeyRule("layers.{}.downsample.2.weight", "downsamples.{}.reduction.weight", LINEAR),
)
CONV_DOWNSAMPLE = (
    KeyRule("layers.{}.downsample.1.{}", "downsamples.{}.proj.{}"),
    KeyRule("layers.{}.downsample.3.{}", "downsamples.{}.norm.{}"),
)
CLASSIFIER = (
    KeyRule("classifier.norm.{}", "norm.{}"),
    KeyRule("classifier.head.{}", "head.fc.{}"),
    KeyRule("head.{}", "head.fc.{}"),  # names of January 2024, whose norm has ours
)
BLOCKS = (
    KeyRule("layers.{}.blocks.{}.norm.{}", "stages.{}.blocks.{}.norm1.{}"),
    KeyRule("layers.{}.blocks.{}.ln_1.{}", "stages.{}.blocks.{}.norm1.{}"),  # names of January 2024
    KeyRule("layers.{}.blocks.{*}", "stages.{}.blocks.{*}"),
)


def moved(
    rules: Iterable[KeyRule], official: str, ours: str, instead_of: str = "", ours_instead_of: str = ""
) -> tuple[KeyRule, ...]:
    """``rules`` of another place: official names begin with ``official`` and ours with ``ours``, where they began with
    ``instead_of`` and ``ours_instead_of``.
    """

    def renamed(names: Any, beginning: str, new: str) -> Any:
        if names is None:
            return None
        if isinstance(names, str):
            assert names.startswith(beginning), f"{names} does not begin with {beginning}"
            return new + names.removeprefix(beginning)
        return tuple(renamed(name, beginning, new) for name in names)

    return tuple(
        replace(
            rule,
            official=renamed(rule.official, instead_of, official),
            ours=renamed(rule.ours, ours_instead_of, ours),
        )
        for rule in rules
    )


def ss2d_rules(num_orders: int = 4, ours: str = "mixer") -> tuple[KeyRule, ...]:
    """Rules of an SS2D layer whose name in our blocks is ``ours``.

    Its state-space parameters stand as in VMamba's package, or as in its single file, where they are flat
    (``x_proj.weight``,
    ``dt_projs.weight``); the layer is called ``op``, in January 2024 ``self_attention``.
    """
    by_order = grouped(num_orders, -1)
    rules: list[KeyRule] = []
    for official in ("op", "self_attention"):
        theirs, block = f"layers.{{}}.blocks.{{}}.{official}.", f"stages.{{}}.blocks.{{}}.{ours}."
        rules += [
            KeyRule(theirs + "x_proj_weight", block + "ssm.x_proj_weight"),
            KeyRule(theirs + "dt_projs_weight", block + "ssm.dt_proj_weight"),
            KeyRule(theirs + "dt_projs_bias", block + "ssm.dt_proj_bias"),
            KeyRule(theirs + "A_logs", block + "ssm.A_log", by_order),
            KeyRule(theirs + "Ds", block + "ssm.D", by_order),
            KeyRule(theirs + "x_proj.weight", block + "ssm.x_proj_weight", by_order),
            KeyRule(theirs + "dt_projs.weight", block + "ssm.dt_proj_weight", by_order),
            KeyRule(theirs + "in_proj.weight", block + "in_proj.weight", LINEAR),
            KeyRule(theirs + "out_proj.weight", block + "out_proj.weight", LINEAR),
            KeyRule(theirs + "{*}", block + "{*}"),
        ]
    return tuple(rules)
