"""GroupMamba: four groups of channels, each scanned along one order of its own.

GroupMamba: Parameter-Efficient and Accurate Group Visual State Space Model, arXiv:2407.13772.
Original: https://github.com/Amshaker/GroupMamba, MIT. Written from the paper and from measurements of the
original, without its code.

Four narrow mixers stand side by side, one for rows, one for columns, and one for each reversed. Their output
is multiplied by their normalised input, then by channel weights made from its means, and normalised by the
same layer again. Before the classifier, a block works on the pooled token alone. The models were trained with
distillation: a second classifier learned from a teacher, and inference averages the two. The original's
backward pass is wrong on maps that are not square; here it is autograd's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, TypeGuard

import torch
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from backbones.base import Constructor, HierarchicalBackbone, build_model
from backbones.layers import ConvDownsample, ConvFFN, GroupMambaLayer, LayerNorm, Scan, channels_last
from backbones.layers.distilled_head import DistilledHead
from backbones.layers.line import Line
from backbones.layers.norm import residual_norm
from backbones.ops.tracing import is_as_written, is_hooked_everywhere, runs_eagerly
from backbones.patterns import CROSS
from backbones.weights import KeyRule
from backbones.zoo import default_cfgs as zoo_cfgs

_norm = partial(LayerNorm, eps=1e-6)  # of stages and blocks; those inside of a layer have 1e-5
_branch_norm = partial(_norm, autocast_out=True)


class GroupMambaBlock(nn.Module):
    """x + mixer(x), then x + mlp(norm(x)); the mixer normalises its input itself.

    Args:
        dim: width of the map.
        mixer: constructor called as ``mixer(dim, device=, dtype=)``.
        mlp_ratio: inner width of the feed-forward layer over ``dim``.
        drop_path: rate of stochastic depth, on both branches.
    """

    def __init__(
        self,
        dim: int,
        mixer: Constructor,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.mixer = mixer(dim, device=device, dtype=dtype)
        self.norm2 = _branch_norm(dim, device=device, dtype=dtype)
        self.mlp = ConvFFN(dim, int(mlp_ratio * dim), residual=False, device=device, dtype=dtype)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, h, w, dim)."""
        x, y = self.chained(x, None)
        return x + y

    def chained(self, x: Tensor, pending: Tensor | None) -> tuple[Tensor, Tensor]:
        """The block of x + pending, its last sum left to what comes behind: see `backbones.base.chain.run_chain`."""
        if _is_as_written(self.mixer, x):
            x, y = residual_norm(x, pending, self.mixer.norm)
            y = self.mixer.of_normed(y)
        else:
            x = x if pending is None else x + pending
            y = self.mixer(x)
        x, y = residual_norm(x, self.drop_path(y), self.norm2)
        return x, self.drop_path(self.mlp(y))

    def line(self, x: Tensor, pending: Tensor | None) -> Line | None:
        """What `chained` does as steps behind one another; None where it cannot be."""
        line = Line.of(x, pending, getattr(self.norm2, "backend", None))
        if line is None:
            return None
        line.layer(self.mixer, x)
        line.drop_path(self.drop_path)
        line.norm(self.norm2)
        line.layer(self.mlp, x)
        line.drop_path(self.drop_path)
        return line


def _is_as_written(mixer: nn.Module, x: Tensor) -> TypeGuard[GroupMambaLayer]:
    """Whether a call of ``mixer`` is its norm and the rest of it."""
    if type(mixer) is not GroupMambaLayer or is_hooked_everywhere() or not is_as_written(mixer):
        return False
    return isinstance(x, Tensor) and runs_eagerly(x)


class GroupStem(nn.Module):
    """A 7 x 7 convolution of stride 2, two 3 x 3, all with batch norm and ReLU, then a 3 x 3 of stride 2."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        hidden_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Sequential(
            nn.Conv2d(in_chans, hidden_dim, 7, 2, 3, bias=False, **dd),
            nn.BatchNorm2d(hidden_dim, **dd),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden_dim, hidden_dim, 3, 1, 1, bias=False, **dd),
            nn.BatchNorm2d(hidden_dim, **dd),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden_dim, hidden_dim, 3, 1, 1, bias=False, **dd),
            nn.BatchNorm2d(hidden_dim, **dd),
            nn.ReLU(inplace=True),
        )
        self.downsample = ConvDownsample(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) to (b, ceil(h / 4), ceil(w / 4), dim)."""
        return self.downsample(channels_last(self.conv(x)))


def _block_rules(official: str, ours: str) -> tuple[KeyRule, ...]:
    """Officially a layer holds four whole mixers, each of one order."""

    def four(name: str) -> tuple[str, ...]:
        return tuple(f"{official}.attn.mamba_g{k}.{name}" for k in (1, 2, 3, 4))

    return (
        KeyRule(four("x_proj_weight"), f"{ours}.mixer.ssm.x_proj_weight", concat=True),
        KeyRule(four("dt_projs_weight"), f"{ours}.mixer.ssm.dt_proj_weight", concat=True),
        KeyRule(four("dt_projs_bias"), f"{ours}.mixer.ssm.dt_proj_bias", concat=True),
        KeyRule(four("A_logs"), f"{ours}.mixer.ssm.A_log"),
        KeyRule(four("Ds"), f"{ours}.mixer.ssm.D"),
        KeyRule(four("in_proj.weight"), f"{ours}.mixer.in_proj.weight"),
        KeyRule(four("out_proj.weight"), f"{ours}.mixer.out_proj.weight"),
        KeyRule(four("conv2d.{}"), f"{ours}.mixer.conv2d.{{}}", concat=True),
        KeyRule(four("out_norm.{}"), f"{ours}.mixer.out_norm.{{}}", concat=True),
        KeyRule(f"{official}.attn.{{*}}", f"{ours}.mixer.{{*}}"),
        KeyRule(f"{official}.mlp.dwconv.dwconv.{{}}", f"{ours}.mlp.dwconv.{{}}"),
        KeyRule(f"{official}.{{*}}", f"{ours}.{{*}}"),
    )


class GroupMamba(HierarchicalBackbone):
    """GroupMamba. See :class:`backbones.base.HierarchicalBackbone` for its arguments.

    Its output is the mean of two classifiers, as of timm's distilled models. After ``set_distilled_training()`` it is
    in training the pair of them: logits of the classifier and of the distilled one.
    The final norm belongs to the head: features of the last stage are not normalised.
    """

    defaults: ClassVar = {"downsample": ConvDownsample, "stage_norm": _norm, "final_norm": nn.Identity}
    head_modules = ("head.norm", "head.class_block")
    dense_norm = _norm
    dense_rules = (KeyRule("head.norm.{}", "out_norms.3.{}"),)  # stages before the last end in a norm of the model

    key_rules = (
        KeyRule("patch_embed1.conv.{*}", "stem.conv.{*}"),
        KeyRule("patch_embed1.{*}", "stem.downsample.{*}"),
        *(KeyRule(f"patch_embed{i + 2}.{{*}}", f"downsamples.{i}.{{*}}") for i in range(3)),
        *(rule for i in range(4) for rule in _block_rules(f"block{i + 1}.{{}}", f"stages.{i}.blocks.{{}}")),
        *_block_rules("post_network.0", "head.class_block"),
        *(KeyRule(f"norm{i + 1}.{{}}", f"stages.{i}.norm.{{}}") for i in range(3)),
        KeyRule("norm4.{}", "head.norm.{}"),
        KeyRule("head.{}", "head.fc.{}"),
        KeyRule("dist_head.{}", "head.fc_dist.{}"),
    )

    def init_weights(self) -> None:
        """As the original: convolutions, too, from a normal distribution, scaled by their fan-out."""
        super().init_weights()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def prunable(self) -> tuple[str, ...]:
        """See :func:`backbones.unprunable`: hidden channels of feed-forward layers.

        The mixers stack groups of the stream's channels and shuffle them, which torch-pruning follows without end.
        """
        return tuple(name for name, _ in self.named_modules() if name.endswith((".mlp.fc1", ".mlp.dwconv")))

    def set_distilled_training(self, enable: bool = True) -> None:
        """Returns both classifiers' logits in training, for a loss that has a teacher.

        A model made with ``distillation=False`` has one classifier, and one tensor in either case.
        """
        self.head.distilled_training = enable

    def get_classifier(self) -> Any:
        """The last linear layer, or with distillation both of them."""
        return (self.head.fc, self.head.fc_dist) if self.head.distillation else self.head.fc

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops what the features of ``indices`` do not need; returns their absolute indices."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head or len(self.stages) < len(self.feature_info):
            self.head.class_block = self.head.norm = nn.Identity()
        return take


def _create_groupmamba(
    variant: str, pretrained: bool, *, d_state: int = 1, mlp_ratios: Sequence[float] = (8, 8, 4, 4),
    stem_dim: int = 64, distillation: bool = True, **kwargs: Any,
) -> nn.Module:  # fmt: skip
    scan = Scan.pop(kwargs, CROSS)
    mixer = partial(GroupMambaLayer, scan=scan, d_state=d_state)
    blocks = [partial(GroupMambaBlock, mixer=mixer, mlp_ratio=ratio) for ratio in mlp_ratios]
    stem = partial(GroupStem, hidden_dim=stem_dim)
    head = partial(DistilledHead, mixer=mixer, distillation=distillation)
    return build_model(GroupMamba, variant, pretrained, scan=scan, stem=stem, block=blocks, head=head, **kwargs)


default_cfgs = generate_default_cfgs(zoo_cfgs("groupmamba"))


@register_model
def groupmamba_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GroupMamba-T, 23 M parameters."""
    args = {"depths": (3, 4, 9, 3), "dims": (64, 128, 348, 448), "stem_dim": 32}
    return _create_groupmamba("groupmamba_tiny", pretrained, **dict(args, **kwargs))


@register_model
def groupmamba_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GroupMamba-S, 35 M parameters."""
    args = {"depths": (3, 4, 16, 3), "dims": (64, 128, 348, 512)}
    return _create_groupmamba("groupmamba_small", pretrained, **dict(args, **kwargs))


@register_model
def groupmamba_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GroupMamba-B, 57 M parameters."""
    args = {"depths": (3, 6, 21, 3), "dims": (96, 192, 424, 512)}
    return _create_groupmamba("groupmamba_base", pretrained, **dict(args, **kwargs))
