"""Plain backbones: patch tokens at one resolution."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from timm.layers import lecun_normal_, to_2tuple, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from backbones.base.chain import can_chain, run_chain
from backbones.base.contract import Backbone, refuse_onnx_export, run_block
from backbones.base.reduction import ReducedPass, TokenReduction, inserted, reduce_tokens, without
from backbones.layers.constructor import Constructor
from backbones.layers.mamba import token_norm
from backbones.layers.norm import RMSNorm, residual_norm
from backbones.layers.patch_embed import PatchEmbed
from backbones.layers.rotary import RotaryEmbedding, resampled, rotate
from backbones.patterns.subset import tokens_at
from backbones.weights import CheckpointError, KeyRule, Weights
from backbones.weights.files import GRID

_POSITIONS = ("first", "middle", "last")
_logger = logging.getLogger(__name__)


class PlainBackbone(Backbone):
    """Patch tokens at one resolution through ``depth`` blocks.

    Args:
        block: constructor called as ``block(embed_dim, norm_layer=, drop_path=rate, device=, dtype=)``, of blocks
            called as ``block(tokens, grid)``, and as ``block(tokens, grid, subset)`` where patches are missing, see
            :class:`backbones.layers.MambaBlock`; of a sequence, layers use them in turn.
        img_size: height and width in pixels that the position embedding is made for.
        patch_embed: constructor called as ``patch_embed(patch_size, stride, in_chans, embed_dim, dynamic_img_pad,
            device=, dtype=)``, with the attributes of :class:`backbones.layers.PatchEmbed`.
        patch_size: side of a patch in pixels.
        stride: distance between patches in pixels, ``patch_size`` unless given.
        in_chans: channels of the image.
        num_classes: size of the classifier, 0 for none.
        global_pool: "token" (the class token), "avg", "max" (over patches), "map" (attn_pool), or "" for
            none.
        embed_dim: width of the tokens.
        depth: number of blocks.
        class_token: whether there is a learned class token.
        class_token_position: where it stands in the sequence: "first", "middle" or "last".
        rope: turn the tokens by their place in the grid before every block, see
            :class:`backbones.layers.RotaryEmbedding`; the turns of the residual stream add up over the blocks. A class
            token is not turned.
        dynamic_img_size: take images of any size and resample the position embedding to their grid.
        dynamic_img_pad: pad an image to whole patches, instead of dropping its remainder.
        norm_layer: constructor of the norms in the blocks.
        final_norm: constructor of the norm behind the last block.
        attn_pool: constructor called as ``attn_pool(embed_dim, device=, dtype=)``, a learned pooling.
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout after the position embedding.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        token_reduction: arguments of :func:`backbones.reduce_tokens`, to lose tokens from block to block.
    """

    feature_indices: ClassVar[int | tuple[int, ...]] = 3
    no_decay: ClassVar[tuple[str, ...]] = ("pos_embed", "cls_token")
    head_modules = ("norm", "attn_pool")
    head_std: ClassVar[float] = 0.02  # of the weights of a fresh classifier
    dense_tap: ClassVar[str] = "branch"  # what the authors' dense models return, see PlainDenseBackbone
    dense_rules: ClassVar[Sequence[KeyRule]] = (
        KeyRule("outnorm_{}.{}", "out_norms.{}.{}"),
        KeyRule("out_map_{}.{}", "out_maps.{}.{}"),
    )

    def __init__(
        self,
        block: Constructor | Sequence[Constructor],
        img_size: int | tuple[int, int] = 224,
        patch_embed: Constructor = PatchEmbed,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 24,
        class_token: bool = True,
        class_token_position: str = "middle",
        rope: bool = False,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        norm_layer: Constructor = token_norm,
        final_norm: Constructor = RMSNorm,
        attn_pool: Constructor | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        token_reduction: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        blocks = [block] if callable(block) else list(block)
        if class_token_position not in _POSITIONS:
            raise ValueError(f"class_token_position: got {class_token_position!r}, expected one of {_POSITIONS}")
        self.class_token_position = class_token_position
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.embed_dim = self.head_hidden_size = embed_dim
        self.num_prefix_tokens = int(class_token)
        self.dynamic_img_size = dynamic_img_size
        embed = patch_embed(patch_size, stride or patch_size, in_chans, embed_dim, dynamic_img_pad, **dd)
        self.patch_embed = cast(Any, embed)
        self.img_size = to_2tuple(img_size)
        self._check_image(*self.img_size)
        self.grid_size = self.patch_embed.grid_size(*self.img_size)
        tokens = self.grid_size[0] * self.grid_size[1] + self.num_prefix_tokens

        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.rope = RotaryEmbedding(embed_dim, self.grid_size, **dd) if rope else None
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks: Any = nn.ModuleList(
            blocks[i % len(blocks)](embed_dim, norm_layer=norm_layer, drop_path=rate, **dd)
            for i, rate in enumerate(rates)
        )
        self.norm = final_norm(embed_dim, **dd)
        self.attn_pool = attn_pool(embed_dim, **dd) if attn_pool is not None else None
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes, global_pool)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": self.patch_embed.stride, "module": f"blocks.{i}"} for i in range(depth)
        ]
        self.init_weights()
        self.token_reduction: TokenReduction | None = None
        if token_reduction is not None:
            reduce_tokens(self, **token_reduction)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Vim's initialisation; what belongs to a mixer alone is initialised there."""
        lecun_normal_(self.patch_embed.proj.weight)
        self.patch_embed.proj.get_parameter("bias").zero_()
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

    @property
    def prunable(self) -> tuple[str, ...] | None:
        """See :func:`backbones.unprunable`; the rotary tables are as wide as the stream."""
        return None if self.rope is None else ()

    @classmethod
    def dense_norm_rules(cls, blocks: Sequence[int]) -> tuple[KeyRule, ...]:
        """Names of the output norms in the authors' dense models that return ``blocks``: counted by output."""
        return tuple(
            KeyRule(rule.official.replace("{}", str(position), 1), rule.ours.replace("{}", str(block), 1))
            for rule in cls.dense_rules
            if isinstance(rule.official, str) and isinstance(rule.ours, str)
            for position, block in enumerate(sorted(blocks))
        )

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
        like: dict[str, Any] = {"device": self.pos_embed.device, "dtype": self.pos_embed.dtype}
        self.head = nn.Linear(self.embed_dim, num_classes, **like) if num_classes > 0 else nn.Identity()
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=self.head_std)
            nn.init.zeros_(self.head.bias)

    def adapt_state_dict(self, weights: Weights, img_size: tuple[int, int] | None = None) -> Weights:
        """Resamples the position embedding, and rotary tables beside it, to the grid of this model.

        State dicts of ours tell the grid of their embedding. Otherwise ``img_size`` does, or it is a square, as in all
        official files, or this model's grid.

        Raises:
            CheckpointError: the grid is unknown; it may be a square as well as have this model's proportions.
        """
        pos_embed = weights.get("pos_embed")
        if (
            pos_embed is None
            or pos_embed.dim() != 3
            or not pos_embed.is_floating_point()
            or ("cls_token" in weights) != bool(self.num_prefix_tokens)
            or pos_embed.shape[1] <= self.num_prefix_tokens
        ):
            return weights
        patches = pos_embed.shape[1] - self.num_prefix_tokens
        grid = weights.grids.get("pos_embed") or self.source_grid(patches, img_size)
        if grid[0] * grid[1] != patches:
            raise CheckpointError(f"pos_embed: {patches} patches, expected {grid[0]} x {grid[1]} as the file says")
        weights = Weights(weights, {**weights.grids, "pos_embed": self.grid_size})
        if grid != self.grid_size:
            _logger.info("position embedding resampled from %d x %d to %d x %d", *grid, *self.grid_size)
            weights["pos_embed"] = self._resample(pos_embed, grid, self.grid_size)
        return self._with_rotary_tables(weights, grid)

    def source_grid(self, patches: int, img_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Rows and columns of a position embedding whose file does not tell, see :meth:`adapt_state_dict`."""
        if img_size is not None:
            stated = self.patch_embed.grid_size(*img_size)
            if stated[0] * stated[1] == patches:
                return stated
        side, (rows, columns) = math.isqrt(patches), self.grid_size
        alike = math.isqrt(patches * rows // columns)  # rows in the proportions of this model
        candidates = {(side, side), (alike, alike * columns // rows)}
        possible = sorted(grid for grid in candidates if grid[0] * grid[1] == patches)
        if possible in ([(side, side)], [self.grid_size]):
            return possible[0]
        grids = " or ".join(f"{height} x {width}" for height, width in possible) or "no square"
        raise CheckpointError(
            f"pos_embed: {patches} patches are {grids}, and the file does not tell their rows and columns; "
            "`ssm-backbones convert --img-size HEIGHT WIDTH` writes a file that does"
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][GRID] = self.grid_size

    def _with_rotary_tables(self, weights: Weights, grid: tuple[int, int]) -> Weights:
        """Tables of this model's grid; where the file has none, they are computed, as they hold nothing learned."""
        if self.rope is None:
            return weights
        for name, own in self.rope.named_buffers(prefix="rope"):
            table = weights.setdefault(name, own)
            if grid != self.grid_size and table.dim() == 2 and table.shape[0] == grid[0] * grid[1]:
                weights[name] = resampled(table, grid, self.grid_size)
        return weights

    def forward_features(self, x: Tensor) -> Tensor:
        """Image to normalised tokens (b, l, embed_dim)."""
        x, grid, tables = self._embed(x)
        reduced = self._reduced_pass(grid, tables)
        if tables is None and reduced is None and not self.grad_checkpointing and can_chain(self.blocks, x):
            return residual_norm(*run_chain(self.blocks, x, grid), self.norm)[1]
        for i in range(len(self.blocks)):
            x, _ = self._through(i, x, grid, tables, reduced)
        return self.norm(x if reduced is None else reduced.end(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens to logits."""
        if self.global_pool == "token":
            x = x[:, self._class_token_index(x.shape[1] - 1)]
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
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        branch: bool = False,
        replace: Callable[[Tensor], Tensor] | None = None,
    ) -> Any:
        """Features after the blocks of ``indices`` (the last n for a number, all for None), and the final features.

        Args:
            x: (b, in_chans, height, width).
            indices: blocks to take; their features come in this order.
            return_prefix_tokens: pair each feature with its class token (b, 1, embed_dim).
            norm: apply the final norm to each.
            stop_early: end with the last block taken; the final features are then those of that block.
            output_fmt: "NCHW" or "NLC", without the class token.
            intermediates_only: return the list alone.
            branch: take what a block adds to the stream instead of the stream behind it, as the authors'
                dense models do.
            replace: called with the patch tokens (b, height, width, c), returns what the blocks get in their place;
                positions and class token are added behind it.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: got {output_fmt!r}, expected 'NCHW' or 'NLC'")
        take, last = feature_take_indices(len(self.blocks), indices)
        x, grid, tables = self._embed(x, replace)
        reduced = self._reduced_pass(grid, tables)
        taken: dict[int, Any] = {}
        for i in range(last + 1 if stop_early else len(self.blocks)):
            x, feature = self._through(i, x, grid, tables, reduced, branch and i in take)
            if i in take:
                feature = self.norm(feature) if norm else feature
                patches, prefix = self._split_class_token(feature) if reduced is None else reduced.split(feature)
                patches = patches if reduced is None else reduced.on_grid(patches)
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
                taken[i] = (patches, prefix) if return_prefix_tokens and prefix is not None else patches
        maps = [taken[i] for i in take]
        return maps if intermediates_only else (self.norm(x if reduced is None else reduced.end(x)), maps)

    def forward_visible(self, x: Tensor, cells: Tensor) -> Tensor:
        """The normalised tokens of some patches, (b, m, embed_dim), where no block sees the others.

        As in masked autoencoders (arXiv:2111.06377). Positions are those of the whole grid.

        Args:
            x: (b, in_chans, height, width).
            cells: (b, m) the raster indices of these patches in each image, in ascending order.

        Raises:
            ValueError: the model reduces tokens by itself, or the shape of ``cells`` does not go with x.
        """
        if self.token_reduction is not None:
            raise ValueError(
                "token_reduction: got a model with it, expected None where patches are missing at the start"
            )
        if cells.dim() != 2 or cells.shape[0] != x.shape[0] or cells.shape[1] == 0:
            raise ValueError(f"cells: got shape {tuple(cells.shape)}, expected ({x.shape[0]}, m) with m >= 1")
        x, grid, tables = self._embed(x)
        patches, token = self._split_class_token(x)
        x = tokens_at(patches, cells)
        x = x if token is None else self._insert_class_token(x, token)
        reduced = self._reduced_pass(grid, tables, cells)
        for i in range(len(self.blocks)):
            x, _ = self._through(i, x, grid, tables, reduced)
        return self._split_class_token(self.norm(x))[0]

    def _reduced_pass(
        self, grid: tuple[int, int], tables: tuple[Tensor, Tensor] | None, cells: Tensor | None = None
    ) -> ReducedPass | None:
        if self.token_reduction is None and cells is None:
            return None
        class_index = None if self.cls_token is None else self._class_token_index
        reduction = self.token_reduction or TokenReduction({})
        return ReducedPass(reduction, grid, tables, class_index, self.grad_checkpointing, cells)

    def _through(
        self,
        i: int,
        x: Tensor,
        grid: tuple[int, int],
        tables: tuple[Tensor, Tensor] | None,
        reduced: ReducedPass | None,
        branch: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The stream behind block i, and the feature there: the stream, or with ``branch`` what the block adds."""
        block = self.blocks[i]
        if reduced is not None:
            return reduced.through(i, block, x, branch)
        x = rotate(x, *tables) if tables else x
        if branch:
            added: list[Tensor] = []

            def keeping(block: Any, x: Tensor, grid: tuple[int, int], subset: None) -> Tensor:
                added.append(block.branch(x, grid, subset))
                return block.join(x, added[-1], grid, subset)

            x = run_block(block, x, grid, None, keeping, checkpointed=self.grad_checkpointing)
            return x, added[0]
        x = run_block(block, x, grid, checkpointed=self.grad_checkpointing)
        return x, x

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
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
            raise ValueError(f"x: got an image of {height} x {width} pixels, expected at least one patch of {smallest}")

    def _embed(
        self, x: Tensor, replace: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, tuple[int, int], tuple[Tensor, Tensor] | None]:
        """Tokens with position embedding and class token, the grid of the patches, and the tokens' rotary tables."""
        refuse_onnx_export()
        grid, same = self.grid_size, True
        if self.dynamic_img_size:
            if isinstance(x, torch.fx.Proxy):
                raise ValueError("dynamic_img_size: got True, but torch.fx traces a plain model for one image size")
            height, width = x.shape[-2:]
            self._check_image(height, width)
            grid = self.patch_embed.grid_size(height, width)
            # A comparison would fix a dynamic size.
            same = not any(isinstance(side, torch.SymInt) for side in grid) and grid == self.grid_size
        else:
            x = _of_size(x, *self.img_size)
        pos_embed = self.pos_embed if same else self._resample(self.pos_embed, self.grid_size, grid)
        x = self.patch_embed(x)
        x = x if replace is None else replace(x.unflatten(1, grid)).flatten(1, 2)
        if self.cls_token is not None:
            x = self._insert_class_token(x, self.cls_token.expand(x.shape[0], -1, -1))
        return self.pos_drop(x + pos_embed), grid, self._rotary_tables(grid, same)

    def _rotary_tables(self, grid: tuple[int, int], same: bool) -> tuple[Tensor, Tensor] | None:
        if self.rope is None:
            return None
        cos, sin = self.rope.tables(grid, same)
        if self.cls_token is None:
            return cos, sin
        still = cos.new_ones(1, 1, self.embed_dim), sin.new_zeros(1, 1, self.embed_dim)
        return self._insert_class_token(cos[None], still[0])[0], self._insert_class_token(sin[None], still[1])[0]

    def _split_class_token(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Patches (b, l, c) and class token (b, 1, c)."""
        if self.cls_token is None:
            return x, None
        index = self._class_token_index(x.shape[1] - 1)
        return without(x, index), x[:, index : index + 1]

    def _insert_class_token(self, patches: Tensor, token: Tensor) -> Tensor:
        return inserted(patches, token, self._class_token_index(patches.shape[1]))

    def _class_token_index(self, patches: int) -> int:
        return {"first": 0, "middle": patches // 2, "last": patches}[self.class_token_position]

    def _resample(self, pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
        """Bicubic, over the patches alone: the class token's slot moves to its place among the new ones.

        The official code resizes everything but slot 0, which with a middle class token is a patch.
        """
        patches, prefix = self._split_class_token(pos_embed)
        patches = resampled(patches, old, new)
        return patches if prefix is None else self._insert_class_token(patches, prefix)


@torch.fx.wrap
def _of_size(x: Tensor, height: int, width: int) -> Tensor:
    """``x``, which has these sides; as a function that returns it, tracing keeps the check."""
    if tuple(x.shape[-2:]) != (height, width):
        raise ValueError(
            f"x: got an image of {x.shape[-2]} x {x.shape[-1]} pixels, expected {height} x {width}; a model made with "
            "dynamic_img_size=True takes any size"
        )
    return x
