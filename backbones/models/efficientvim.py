"""EfficientViM: timm's own model, here as the maps of a dense backbone.

EfficientViM: Efficient Vision Mamba with Hidden State Mixer based State Space Duality, arXiv:2411.15241.
Original: https://github.com/mlvlab/EfficientViM (MIT). timm has the model and registers its names, ``efficientvim_m1``
to ``efficientvim_m4`` and their distilled forms; nothing of it is written again here.

Three stages of strides 16, 32 and 64 mix the tokens through a few hidden states: softmax-weighted sums of all tokens,
on which the wide linear layers run. The authors' dense models return the maps of the stages without a norm.
"""

from __future__ import annotations

from typing import Any, cast

import timm
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from backbones.base.contract import run_block
from backbones.base.hierarchical import Stage, StagedBackbone
from backbones.weights import WEIGHT_KEYS, KeyRule, Layout


def _vector(x: Tensor) -> Tensor:
    """(1, c, 1) or (c,) to (c,)."""
    if x.shape not in ((1, x.numel(), 1), (x.numel(),)):
        raise ValueError("expected one value for each channel")
    return x.flatten()


_CHANNELS = Layout(_vector, lambda x: x[None, :, None])  # the authors' layer norms; timm's are vectors already


class _MapStage(Stage):
    """A stage of timm's blocks, which return their hidden states as well."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = cast(Any, run_block(block, x, checkpointed=self.grad_checkpointing))
        return self.norm(x)


class EfficientViM(StagedBackbone):
    """Stem, stages and downsamplings of timm's EfficientViM; its head reads hidden states that no map shows.

    Takes images of any size; every stride rounds up.

    Args:
        model: a ``timm.models.efficientvim.EfficientViM`` (timm 1.0.30 or newer), whose parts these are.
    """

    weight_keys = ("model_ema", *WEIGHT_KEYS)  # the published accuracies are those of the averaged weights
    key_rules = (
        KeyRule("patch_embed.{*}", "stem.{*}"),
        KeyRule("stages.{}.downsample.{*}", "downsamples.{}.{*}"),
        KeyRule("stages.{}.blocks.{}.norm.{}", "stages.{}.blocks.{}.norm.{}", _CHANNELS),
        *(KeyRule(name, None) for name in ("weights", "weights_dist")),
        *(KeyRule(f"{name}.{{}}.{{}}", None) for name in ("norm", "heads", "heads_dist")),
    )
    feature_indices = (0, 1, 2)
    head_modules = ()
    dense_norm = nn.Identity
    dense_rules = ()

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.num_features = 0, model.in_chans, model.embed_dim[-1]
        self.head_hidden_size = self.num_features
        self.feature_info = list(model.feature_info)
        self.pretrained_cfg = model.pretrained_cfg
        self.stem = model.patch_embed
        self.stages = nn.ModuleList(_MapStage(stage.blocks, nn.Identity()) for stage in model.stages)
        self.downsamples = nn.ModuleList(stage.downsample for stage in model.stages[:-1])

    @classmethod
    def create(cls, arch: str, **kwargs: Any) -> EfficientViM:
        """The dense model of timm's ``arch``; arguments as of ``timm.create_model``."""
        return cls(timm.create_model(arch, **kwargs))

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops what the maps of ``indices`` do not need; returns their absolute indices. There is no norm nor head."""
        take, last = feature_take_indices(len(self.stages), indices)
        self.stages, self.downsamples = self.stages[: last + 1], self.downsamples[:last]
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Image to the last map (b, height / 64, width / 64, num_features)."""
        return self.forward_intermediates(x, indices=1, output_fmt="NHWC")[0]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        output_fmt: str = "NCHW",
        intermediates_only: bool = True,
    ) -> list[Tensor]:
        """Maps at the end of the stages of ``indices`` (the last n for a number, all for None).

        Args:
            x: (b, in_chans, height, width).
            indices: stages to take; their maps come in this order.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: True, as there are no features behind the maps.

        Raises:
            ValueError: another ``output_fmt``, or features behind the maps are asked for.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt: got {output_fmt!r}, expected 'NCHW' or 'NHWC'")
        if not intermediates_only:
            raise ValueError("intermediates_only: got False, but EfficientViM's dense model ends in its maps")
        take, last = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        taken: dict[int, Tensor] = {}
        for i in range(last + 1):
            if i > 0:
                x = self.downsamples[i - 1](x)
            x = self.stages[i](x)
            if i in take:
                taken[i] = x if output_fmt == "NCHW" else x.permute(0, 2, 3, 1)
        return [taken[i] for i in take]
