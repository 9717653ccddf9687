"""Hierarchical backbones: four stages of channels-last maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, cycle
from operator import mul
from typing import Any, ClassVar

import torch
from timm.layers import ClassifierHead
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from backbones.base.chain import can_chain, run_chain
from backbones.base.contract import Backbone, refuse_onnx_export, run_block
from backbones.layers.constructor import Constructor
from backbones.layers.norm import LayerNorm, residual_norm
from backbones.layers.recorded import run_recorded

_POOLINGS = ("avg", "max", "avgmax", "catavgmax", "")


class StagedBackbone(Backbone):
    """What follows from stages with downsamplings between them."""

    stages: Any
    downsamples: nn.ModuleList

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory: blocks are computed again in backward instead of keeping their activations."""
        super().set_grad_checkpointing(enable)
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters by depth: a block each, or a stage each where ``coarse``.

        A downsampling counts to the first block behind it, a norm to the last block before it.
        """
        first = () if coarse else (0,)
        return {
            "stem": r"^stem",
            "blocks": [
                *((rf"^downsamples\.{i}\b", (i + 1, *first)) for i in range(len(self.downsamples))),
                (r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.norm", (99999,)),
                (r"^norm", (99999,)),
            ],
        }


class HierarchicalBackbone(StagedBackbone):
    """Stages of channels-last maps (b, height, width, c), each of half the resolution of the one before.

    Args:
        stem: constructor called as ``stem(in_chans, dims[0], device=, dtype=)``; takes the image, returns a
            channels-last map.
        block: constructor called as ``block(dim, drop_path=rate, device=, dtype=)``; of a sequence, stage i
            takes the i-th, and where that is a sequence, too, its blocks use them in turn.
        downsample: constructor called as ``downsample(dims[i], dims[i + 1], device=, dtype=)``, between two
            stages; of a sequence, the i-th.
        depths: blocks of each stage.
        dims: width of each stage.
        strides: stride of the stem, then of each downsampling.
        in_chans: channels of the image.
        num_classes: size of the classifier, 0 for none.
        global_pool: "avg", "max" or another of timm's poolings, or "" for none.
        stage_norm: constructor of a norm at the end of every stage but the last, or None.
        final_norm: constructor of the norm before pooling.
        head: constructor called as ``head(dims[-1], num_classes, pool_type=, drop_rate=, input_fmt="NHWC",
            device=, dtype=)``, with timm's ``ClassifierHead`` as the model.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    feature_indices: ClassVar[int | tuple[int, ...]] = (0, 1, 2, 3)
    output_fmt = "NHWC"  # of the stages, for timm's feature hooks

    def __init__(
        self,
        stem: Constructor,
        block: Constructor | Sequence[Constructor | Sequence[Constructor]],
        downsample: Constructor | Sequence[Constructor],
        depths: Sequence[int] = (2, 2, 9, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        strides: Sequence[int] = (4, 2, 2, 2),
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stage_norm: Constructor | None = None,
        final_norm: Constructor = LayerNorm,
        head: Callable[..., Any] = ClassifierHead,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        blocks = [block] * len(depths) if callable(block) else list(block)
        downsamples = [downsample] * (len(depths) - 1) if callable(downsample) else list(downsample)
        if not len(blocks) == len(depths) == len(dims) == len(strides) == len(downsamples) + 1:
            raise ValueError(
                f"depths: got {len(depths)} stages, dims {len(dims)}, strides {len(strides)}, block {len(blocks)} and "
                f"downsample {len(downsamples)}; they must agree"
            )
        _check_pool(global_pool)
        self.depths = tuple(depths)  # as built: weight files have all stages, also where some are pruned
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, dims[-1]
        self.stem = stem(in_chans, dims[0], **dd)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.stages: Any = nn.ModuleList()
        self.downsamples = nn.ModuleList()
        self.feature_info = []
        for i, (depth, dim, reduction) in enumerate(zip(depths, dims, accumulate(strides, mul), strict=True)):
            last = i == len(dims) - 1
            given = blocks[i]
            in_turn = cycle([given] if callable(given) else given)
            layers = [next(in_turn)(dim, drop_path=next(rates), **dd) for _ in range(depth)]
            norm = stage_norm(dim, **dd) if stage_norm is not None and not last else nn.Identity()
            self.stages.append(Stage(layers, norm))
            if not last:
                self.downsamples.append(downsamples[i](dim, dims[i + 1], **dd))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        self.norm = final_norm(dims[-1], **dd)
        self.head = head(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC", **dd)
        self.head_hidden_size = dims[-1] * self.head.global_pool.feat_mult()
        self.init_weights()

    def init_weights(self) -> None:
        """See :func:`init_linears`; the rest keeps what its module drew."""
        init_linears(self)

    @property
    def global_pool(self) -> str:
        """Name of the pooling before the classifier."""
        return self.head.global_pool.pool_type

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier, freshly initialised, and the pooling where given; 0 classes remove it."""
        _check_pool(global_pool)
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)
        if isinstance(self.head.fc, nn.Linear):
            like = next(self.stem.parameters())  # a head without classifier does not know
            self.head.fc.to(device=like.device, dtype=like.dtype)
            nn.init.normal_(self.head.fc.weight, std=0.02)
            nn.init.zeros_(self.head.fc.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Image to a normalised channels-last map (b, height / 32, width / 32, num_features)."""
        x = self._stem(x)
        for i in range(len(self.stages)):
            x = self.stages[i](self._entering(i, x))
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Channels-last map to logits."""
        return self.head(x, pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        tap: str = "output",
        replace: Callable[[Tensor], Tensor] | None = None,
    ) -> Any:
        """Maps at the end of the stages of ``indices`` (the last n for a number, all for None), and the final features.

        Args:
            x: (b, in_chans, height, width).
            indices: stages to take; their maps come in this order.
            norm: apply the final norm to the last stage's map.
            stop_early: end with the last stage taken; the final features are then those of that stage,
                without the final norm.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the list alone.
            tap: "output", or "input" for the maps that the stages read: the stem's, then those of the downsamplings.
            replace: called with the stem's map (b, height, width, c), returns what the stages get in its place.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt: got {output_fmt!r}, expected 'NCHW' or 'NHWC'")
        if tap not in ("output", "input"):
            raise ValueError(f"tap: got {tap!r}, expected 'output' or 'input'")
        take, last = feature_take_indices(len(self.stages), indices)
        final = len(self.feature_info) - 1
        x = self._stem(x)
        x = x if replace is None else replace(x)
        taken: dict[int, Tensor] = {}
        for i in range(last + 1 if stop_early else len(self.stages)):
            entering = self._entering(i, x)
            x = self.stages[i](entering)
            if i in take:
                feature = entering if tap == "input" else self.norm(x) if norm and i == final else x
                taken[i] = feature.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else feature
        maps = [taken[i] for i in take]
        if intermediates_only:
            return maps
        return (self.norm(x) if i == final else x), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops what the features of ``indices`` do not need; returns their absolute indices."""
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages, self.downsamples = self.stages[: last + 1], self.downsamples[:last]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take

    def _stem(self, x: Tensor) -> Tensor:
        refuse_onnx_export()
        return run_recorded(self.stem, self.stem, _at_least(x, self.feature_info[-1]["reduction"]))

    def _entering(self, i: int, x: Tensor) -> Tensor:
        """The input of stage i, from the output of the one before or of the stem."""
        return run_recorded(self.downsamples[i - 1], self.downsamples[i - 1], x) if i > 0 else x


@torch.fx.wrap
def _at_least(x: Tensor, smallest: int) -> Tensor:
    """``x``, whose sides are long enough; as a function that returns it, tracing keeps the check."""
    height, width = x.shape[-2:]
    if height < smallest or width < smallest:
        raise ValueError(f"x: got an image of {height} x {width} pixels, expected at least {smallest} x {smallest}")
    return x


def init_linears(module: nn.Module) -> None:
    """Linear layers from a normal distribution (std 0.02) with zero bias.

    The originals truncate it at +-2, a hundred deviations away; that changes nothing and takes most of the time.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _check_pool(global_pool: str | None) -> None:
    if global_pool not in (None, *_POOLINGS):
        raise ValueError(f"global_pool: got {global_pool!r}, expected one of {_POOLINGS}")


class Stage(nn.Module):
    """Blocks at one resolution and the norm that ends them."""

    def __init__(self, blocks: Sequence[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, h, w, dim)."""
        if not self.grad_checkpointing and can_chain(self.blocks, x):
            return residual_norm(*run_chain(self.blocks, x), self.norm)[1]
        for block in self.blocks:
            x = run_block(block, x, checkpointed=self.grad_checkpointing)
        return self.norm(x)
