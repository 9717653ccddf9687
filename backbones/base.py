"""What every backbone shares: timm's model contract, for plain (one resolution) and hierarchical (four stages) models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, lecun_normal_, to_2tuple, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backbones.checkpoints import KeyRule, StateDict
from backbones.layers.mamba import MambaBlock
from backbones.layers.patch_embed import PatchEmbed

_logger = logging.getLogger(__name__)

Constructor = Callable[..., nn.Module]
layer_norm = partial(nn.LayerNorm, eps=1e-5)
rms_norm = partial(nn.RMSNorm, eps=1e-5)

# Parameters of a state-space layer that its authors exempt from weight decay, and biases that are stacked over orders.
_NO_DECAY = ("A_log", "D", "dt_proj_bias", "conv_bias", "pos_embed", "cls_token")


class Backbone(nn.Module):
    """The part of timm's contract that does not depend on the shape of the features."""

    key_rules: ClassVar[Sequence[KeyRule]] = ()  # official names and layouts, see backbones.checkpoints

    num_classes: int
    in_chans: int
    num_features: int
    head_hidden_size: int
    grad_checkpointing: bool = False
    feature_info: list[dict[str, Any]]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory: blocks are computed again in backward instead of keeping their activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay besides the 1-D ones.

        A_log is among them as in Mamba; the official vision repositories mark it but their optimizers never read the mark.
        """
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in _NO_DECAY}

    def adapt_state_dict(self, state_dict: StateDict) -> StateDict:
        """Fits weights of another input size to this model; raises nothing, the check that follows does."""
        return state_dict

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (b, in_chans, height, width) to normalised features."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits, or to what the classifier would see."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Image (b, in_chans, height, width) to logits (b, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def _block(self, block: nn.Module, *args: Any) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


class PlainBackbone(Backbone):
    """Patch tokens at one resolution through ``depth`` mixers: Vim and LBVim.

    Args:
        mixer: constructor called as ``mixer(embed_dim, device=, dtype=)``; of a sequence, layers take them in turn.
        img_size: height and width in pixels that the position embedding is made for.
        patch_size: side of a patch in pixels.
        stride: distance between patches in pixels, ``patch_size`` unless given.
        in_chans: channels of the image.
        num_classes: size of the classifier, 0 for none.
        global_pool: "token" (the class token), "avg", "max" (over patches), "map" (attn_pool), or "" for none.
        embed_dim: width of the tokens.
        depth: number of blocks.
        class_token: put a learned token in the middle of the sequence.
        dynamic_img_size: take images of any size and resample the position embedding to their grid.
        dynamic_img_pad: pad an image to whole patches, instead of dropping its remainder.
        norm_layer: constructor of the norms.
        attn_pool: constructor called as ``attn_pool(embed_dim, device=, dtype=)``, a learned pooling.
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout after the position embedding.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    def __init__(
        self,
        mixer: Constructor | Sequence[Constructor],
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 24,
        class_token: bool = True,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        norm_layer: Constructor = rms_norm,
        attn_pool: Constructor | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        mixers = [mixer] if callable(mixer) else list(mixer)
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.embed_dim = self.head_hidden_size = embed_dim
        self.num_prefix_tokens = int(class_token)
        self.dynamic_img_size = dynamic_img_size
        self.patch_embed = PatchEmbed(
            patch_size, stride or patch_size, in_chans, embed_dim, dynamic_img_pad, **dd
        )
        self.img_size = to_2tuple(img_size)
        self._check_image(*self.img_size)
        self.grid_size = self.patch_embed.grid_size(*self.img_size)
        tokens = self.grid_size[0] * self.grid_size[1] + self.num_prefix_tokens

        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            MambaBlock(
                norm_layer(embed_dim, **dd),
                mixers[i % len(mixers)](embed_dim, **dd),
                DropPath(rate) if rate > 0 else nn.Identity(),
            )
            for i, rate in enumerate(rates)
        )
        self.norm = norm_layer(embed_dim, **dd)
        self.attn_pool = attn_pool(embed_dim, **dd) if attn_pool is not None else None
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes, global_pool)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": self.patch_embed.stride, "module": f"blocks.{i}"}
            for i in range(depth)
        ]
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Vim's initialisation; what belongs to a mixer alone is initialised there."""
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        for block in self.blocks:
            block.mixer.out_proj.weight.div_(len(self.blocks) ** 0.5)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier, freshly initialised, and the pooling where given; 0 classes remove it."""
        if global_pool is not None:
            known: tuple[str, ...] = ("avg", "max", "")
            if self.cls_token is not None:
                known = ("token", *known)
            if self.attn_pool is not None:
                known = ("map", *known)
            if global_pool not in known:
                raise ValueError(f"global_pool: got {global_pool!r}, expected one of {known}")
            self.global_pool = global_pool
            if global_pool != "map":
                self.attn_pool = None
        self.num_classes = num_classes
        like = {"device": self.pos_embed.device, "dtype": self.pos_embed.dtype}
        self.head = nn.Linear(self.embed_dim, num_classes, **like) if num_classes > 0 else nn.Identity()
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def adapt_state_dict(self, state_dict: StateDict) -> StateDict:
        """Resamples the position embedding of a square grid to this model's grid."""
        pos_embed = state_dict.get("pos_embed")
        if pos_embed is None or pos_embed.dim() != 3 or pos_embed.shape == self.pos_embed.shape:
            return state_dict
        side = round((pos_embed.shape[1] - self.num_prefix_tokens) ** 0.5)
        if side * side + self.num_prefix_tokens != pos_embed.shape[1]:
            return state_dict
        _logger.info("position embedding resampled from %d x %d to %d x %d", side, side, *self.grid_size)
        return {**state_dict, "pos_embed": self._resample(pos_embed, (side, side), self.grid_size)}

    def forward_features(self, x: Tensor) -> Tensor:
        """Image to normalised tokens (b, l, embed_dim)."""
        x, grid = self._embed(x)
        for block in self.blocks:
            x = self._block(block, x, grid)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens to logits."""
        if self.global_pool == "token":
            x = x[:, (x.shape[1] - 1) // 2]
        elif self.attn_pool is not None:
            x = self.attn_pool(x)
        elif self.global_pool:
            patches = self._split_class_token(x)[0]
            x = patches.mean(1) if self.global_pool == "avg" else patches.amax(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Features after the blocks of ``indices`` (the last n for a number, all for None), and the final features.

        Args:
            x: (b, in_chans, height, width).
            indices: blocks to take.
            return_prefix_tokens: pair each feature with its class token (b, 1, embed_dim).
            norm: apply the final norm to each.
            stop_early: end with the last block taken; the final features are then those of that block.
            output_fmt: "NCHW" or "NLC", without the class token.
            intermediates_only: return the list alone.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: got {output_fmt!r}, expected 'NCHW' or 'NLC'")
        take, last = feature_take_indices(len(self.blocks), indices)
        x, grid = self._embed(x)
        taken = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._block(block, x, grid)
            if i in take:
                patches, prefix = self._split_class_token(self.norm(x) if norm else x)
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
                taken.append((patches, prefix) if return_prefix_tokens and prefix is not None else patches)
        return taken if intermediates_only else (self.norm(x), taken)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops what the features of ``indices`` do not need; returns their absolute indices."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def _check_image(self, height: int, width: int) -> None:
        smallest = 1 if self.patch_embed.pad else self.patch_embed.patch_size
        if height < smallest or width < smallest:
            raise ValueError(
                f"x: got an image of {height} x {width} pixels, expected at least one patch of {smallest}"
            )

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens with position embedding and class token, and the grid of the patches."""
        height, width = x.shape[-2:]
        pos_embed, grid = self.pos_embed, self.grid_size
        if self.dynamic_img_size:
            self._check_image(height, width)
            grid = self.patch_embed.grid_size(height, width)
            if grid != self.grid_size:
                pos_embed = self._resample(pos_embed, self.grid_size, grid)
        elif (height, width) != self.img_size:
            raise ValueError(
                f"x: got an image of {height} x {width} pixels, expected {self.img_size[0]} x {self.img_size[1]}; "
                "a model made with dynamic_img_size=True takes any size"
            )
        x = self.patch_embed(x)
        if self.cls_token is not None:
            middle = x.shape[1] // 2
            x = torch.cat([x[:, :middle], self.cls_token.expand(x.shape[0], -1, -1), x[:, middle:]], dim=1)
        return self.pos_drop(x + pos_embed), grid

    def _split_class_token(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Patches (b, l, c) and class token (b, 1, c), which stands in the middle."""
        if self.cls_token is None:
            return x, None
        middle = (x.shape[1] - 1) // 2
        return torch.cat([x[:, :middle], x[:, middle + 1 :]], dim=1), x[:, middle : middle + 1]

    def _resample(self, pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
        """Bicubic, over the patches alone: the class token's slot moves from the old middle to the new one.

        The official code resizes everything but slot 0, which with a middle class token is a patch.
        """
        patches, prefix = self._split_class_token(pos_embed)
        maps = patches.float().transpose(1, 2).unflatten(2, old)
        maps = F.interpolate(maps, size=new, mode="bicubic", align_corners=False).to(pos_embed.dtype)
        patches = maps.flatten(2).transpose(1, 2)
        if prefix is None:
            return patches
        middle = patches.shape[1] // 2
        return torch.cat([patches[:, :middle], prefix, patches[:, middle:]], dim=1)


class HierarchicalBackbone(Backbone):
    """Four stages at strides 4, 8, 16, 32 on channels-last maps (b, height, width, c): the other families.

    Args:
        stem: constructor called as ``stem(in_chans, dims[0], device=, dtype=)``; takes the image, returns a channels-last map.
        block: constructor called as ``block(dim, drop_path=rate, device=, dtype=)``; of a sequence, stage i takes the i-th.
        downsample: constructor called as ``downsample(dims[i], dims[i + 1], device=, dtype=)``, between two stages.
        depths: blocks of each stage.
        dims: width of each stage.
        in_chans: channels of the image.
        num_classes: size of the classifier, 0 for none.
        global_pool: "avg", "max" or another of timm's poolings, or "" for none.
        stage_norm: constructor of a norm at the end of every stage but the last, or None.
        final_norm: constructor of the norm before pooling.
        head: constructor called as ``head(dims[-1], num_classes, pool_type=, drop_rate=, input_fmt="NHWC", device=, dtype=)``, with
            timm's ``ClassifierHead`` as the model.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    def __init__(
        self,
        stem: Constructor,
        block: Constructor | Sequence[Constructor],
        downsample: Constructor,
        depths: Sequence[int] = (2, 2, 9, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stage_norm: Constructor | None = None,
        final_norm: Constructor = layer_norm,
        head: Callable[..., Any] = ClassifierHead,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        blocks = [block] * len(depths) if callable(block) else list(block)
        if not len(blocks) == len(depths) == len(dims):
            raise ValueError(
                f"depths: got {len(depths)} stages, dims {len(dims)} and block {len(blocks)}; they must agree"
            )
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, dims[-1]
        self.stem = stem(in_chans, dims[0], **dd)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList()
        self.downsamples = nn.ModuleList()
        self.feature_info = []
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            last = i == len(dims) - 1
            layers = [blocks[i](dim, drop_path=next(rates), **dd) for _ in range(depth)]
            norm = stage_norm(dim, **dd) if stage_norm is not None and not last else nn.Identity()
            self.stages.append(Stage(layers, norm))
            if not last:
                self.downsamples.append(downsample(dim, dims[i + 1], **dd))
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"})
        self.norm = final_norm(dims[-1], **dd)
        self.head = head(
            dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC", **dd
        )
        self.head_hidden_size = self.head.num_features
        self.init_weights()

    def init_weights(self) -> None:
        """Linear layers from a truncated normal (std 0.02) with zero bias; the rest keeps what its module drew."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def global_pool(self) -> str:
        """Name of the pooling before the classifier."""
        return self.head.global_pool.pool_type

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters by depth, for layer-wise learning rates; a downsampling counts to the stage it leads to."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)"
        return {
            "stem": r"^stem",
            "blocks": [
                (r"^downsamples\.(\d+)", (0,)),
                (blocks, None),
                (r"^stages\.(\d+)\.norm", (0,)),
                (r"^norm", (99999,)),
            ],
        }

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier, freshly initialised, and the pooling where given; 0 classes remove it."""
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)
        if isinstance(self.head.fc, nn.Linear):
            trunc_normal_(self.head.fc.weight, std=0.02)
            nn.init.zeros_(self.head.fc.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Image to a normalised channels-last map (b, height / 32, width / 32, num_features), sizes rounded as the stem does."""
        x = self._stem(x)
        for i in range(len(self.stages)):
            x = self._stage(i, x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Channels-last map to logits."""
        return self.head(x, pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps at the end of the stages of ``indices`` (the last n for a number, all for None), and the final features.

        Args:
            x: (b, in_chans, height, width).
            indices: stages to take.
            norm: apply the final norm to the last stage's map.
            stop_early: end with the last stage taken; the final features are then those of that stage, without the final norm.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the list alone.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt: got {output_fmt!r}, expected 'NCHW' or 'NHWC'")
        take, last = feature_take_indices(len(self.stages), indices)
        final = len(self.feature_info) - 1
        x = self._stem(x)
        taken = []
        for i in range(last + 1 if stop_early else len(self.stages)):
            x = self._stage(i, x)
            if i in take:
                feature = self.norm(x) if norm and i == final else x
                taken.append(feature.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else feature)
        if intermediates_only:
            return taken
        return (self.norm(x) if i == final else x), taken

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
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
        height, width = x.shape[-2:]
        smallest = self.feature_info[-1]["reduction"]
        if height < smallest or width < smallest:
            raise ValueError(
                f"x: got an image of {height} x {width} pixels, expected at least {smallest} x {smallest}"
            )
        return self.stem(x)

    def _stage(self, i: int, x: Tensor) -> Tensor:
        if i > 0:
            x = self.downsamples[i - 1](x)
        for block in self.stages[i].blocks:
            x = self._block(block, x)
        return self.stages[i].norm(x)


class Stage(nn.Module):
    """Blocks at one resolution and the norm that ends them; run by the backbone, which may checkpoint each block."""

    def __init__(self, blocks: Sequence[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
