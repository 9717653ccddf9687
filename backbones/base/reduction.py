"""Fewer tokens in plain models: pruning as in ToP-ViM, merging as in R-MeeTo.

Exploring Token Pruning in Vision State Space Models (ToP-ViM), arXiv:2409.18962; Faster Vision Mamba is Rebuilt in
Minutes via Merged Token Re-training (R-MeeTo), arXiv:2412.12496.

The tokens that are left stay in the order of the sequence, so orders of a sequence, as Vim's, walk them as they are.
Orders of a grid, as PlainMamba's, skip what is missing: each image then has orders of its own, see
:class:`backbones.patterns.subset.Subset`. Masked autoencoders use the same: masked patches are missing from the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.base.contract import run_block
from backbones.layers.mamba import MambaMixer
from backbones.layers.rotary import rotate
from backbones.patterns.subset import Subset, tokens_at

_MODES = ("prune", "merge")
_SCORES = ("out", "norm")
_Model = TypeVar("_Model", bound=nn.Module)
_Grid = tuple[int, int]


@dataclass(frozen=True)
class TokenReduction:
    """Where a plain model loses tokens, and how; :func:`reduce_tokens` explains the fields."""

    schedule: dict[int, float]
    mode: str = "prune"
    score: str = "out"
    mirrored: bool = False
    align: str | None = None

    def kept_patches(self, patches: int, amount: float, central: bool) -> int:
        """How many of ``patches`` a step leaves.

        Args:
            patches: tokens before the step, without the class token.
            amount: of the schedule.
            central: whether a class token stands in the middle. Their number then stays odd or even, so that as many
                stand on either side of it as before.
        """
        if self.mode == "merge":
            return patches - min(int(amount), patches // 2)
        kept = math.ceil(round(patches * amount, 6))
        if central:
            kept -= (patches - kept) % 2
        return max(kept, 1)


def reduce_tokens(
    model: _Model,
    schedule: float | Mapping[int, float] | None = None,
    mode: str = "prune",
    *,
    score: str = "out",
    mirrored: bool = False,
    align: str | None = None,
) -> _Model:
    """Lets a plain model drop or merge tokens on their way through its blocks; changes it in place and returns it.

    It needs no weights of its own, so official files load as before, R-MeeTo's and ToP-ViM's among them, and a state
    dict fits a model with and without it. ``model.token_reduction = None`` undoes it. Features are put back on the
    grid: a cell whose token was dropped takes the nearest token that is left, merged cells share one. Pooling "avg" and
    "max" is over the tokens that are left.

    "prune" keeps the tokens of the highest score in every image. "merge" matches every second token with the most alike
    of the others, by the cosine of what the block before adds to them, and replaces the most alike pairs by their mean,
    weighted by how many tokens stand behind each.

    Args:
        model: Vim, LBVim, LocalVim, PlainMamba, Adventurer, or a module that holds one, as timm's
            ``features_only=True`` or a dense backbone. Orders of a grid skip the tokens that are gone, in LocalVim also
            the slots that pad the grid to whole windows; PlainMamba's convolutions read zeros there and cost what they
            did.
        schedule: what happens in front of which block, counted from 0: the share of patches to keep (prune), or the
            number of tokens to merge away (merge), at most half. One number holds for ToP-ViM's blocks 5, 10 and 15, or
            R-MeeTo's 2, 4, 6, ...; None is ToP-ViM's 0.8, or R-MeeTo's 5. The number of pruned tokens is rounded as in
            ToP-ViM, see :meth:`TokenReduction.kept_patches`. R-MeeTo's released code merges down to 76 tokens in front
            of block 22, whatever was asked for; with 5 a step and 197 tokens that is
            ``{**dict.fromkeys(range(2, 22, 2), 5), 22: 71}``.
        mode: "prune" or "merge".
        score: of a token to be pruned. "out" sums the channels of the gated output in the mixer in front: along a
            sequence that of the last order, as ToP-ViM's released code does for Vim, on a grid that of all orders;
            "norm" is the length of what the mixer in front adds.
        mirrored: do as ToP-ViM's released code, which reads the scores from the last token to the first, and lets the
            class token compete in every image of a batch but the first, where it may be kept twice.
        align: "decay" lets the state decay over dropped tokens, as if they had no features; None does not, as in
            ToP-ViM's released code. The alignment of the paper was not released and cannot be checked. Vim and LBVim
            can do it, without a local window.

    Raises:
        ValueError: the model holds no plain backbone, or more than one; the schedule names a block or an amount that
            is out of range; an option is unknown or does not go with another or with the model.
    """
    backbone = plain_backbone(model)
    depth = len(backbone.feature_info)
    if mode not in _MODES:
        raise ValueError(f"mode: got {mode!r}, expected one of {_MODES}")
    if score not in _SCORES:
        raise ValueError(f"score: got {score!r}, expected one of {_SCORES}")
    if align not in (None, "decay"):
        raise ValueError(f"align: got {align!r}, expected 'decay' or None")
    if mode == "merge" and (score != "out" or mirrored or align):
        raise ValueError("score, mirrored, align: got one with mode='merge', expected none, they are for pruning")
    if mirrored and align:
        raise ValueError("align: got 'decay' with mirrored=True, expected None: the released code aligns nothing")
    if align:
        for block in backbone.blocks:
            _check_alignment(block.mixer)
    backbone.token_reduction = TokenReduction(_checked_schedule(schedule, mode, depth), mode, score, mirrored, align)
    return model


def plain_backbone(model: nn.Module) -> Any:
    """The one plain backbone that ``model`` is or holds.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = [module for module in model.modules() if hasattr(module, "token_reduction")]
    if len(found) != 1:
        raise ValueError(f"model: {type(model).__name__} holds {len(found)} plain backbones, expected one")
    return found[0]


def _check_alignment(mixer: nn.Module) -> None:
    if not isinstance(mixer, MambaMixer) or mixer.directions is None:
        scan: Any = mixer.scan
        raise ValueError(
            f"align: got 'decay' for {type(mixer).__name__} with {scan.pattern.name!r} orders, expected a model with "
            "Vim's mixer and orders of a sequence"
        )
    if callable(mixer.scan.local_window) or mixer.scan.local_window > 1:
        raise ValueError("align: got 'decay' with a local window, expected a scan without one")


def _checked_schedule(schedule: float | Mapping[int, float] | None, mode: str, depth: int) -> dict[int, float]:
    if schedule is None:
        schedule = 0.8 if mode == "prune" else 5
    if not isinstance(schedule, Mapping):
        blocks = range(5, min(20, depth), 5) if mode == "prune" else range(2, depth, 2)
        if not blocks:
            raise ValueError(
                f"schedule: got {schedule} for a model of {depth} blocks, which has none of those that one number is "
                "for, expected {block: amount}"
            )
        schedule = dict.fromkeys(blocks, schedule)
    if wrong := [i for i in schedule if not isinstance(i, int) or not 1 <= i < depth]:
        raise ValueError(f"schedule: got block {wrong[0]!r}, expected one within 1..{depth - 1}")
    for amount in schedule.values():
        if mode == "prune" and not 0 < amount <= 1:
            raise ValueError(f"schedule: got {amount}, expected a share of patches to keep within (0, 1]")
        if mode == "merge" and (amount != int(amount) or amount < 0):
            raise ValueError(f"schedule: got {amount}, expected a number of tokens to merge, at least 0")
    nothing = 1 if mode == "prune" else 0
    return {block: amount for block, amount in schedule.items() if amount != nothing}


class ReducedPass:
    """One batch on its way through the blocks of a model with fewer and fewer tokens.

    Args:
        reduction: what to do.
        grid: rows and columns of the patches.
        tables: rotary tables (l, c) of all tokens, or None.
        class_index: gives a class token's place among that many patches; None where there is no class token.
        checkpointed: compute blocks again in backward.
        cells: (b, m) the raster index of each patch that is there at the start, in ascending order; None: all are.

    Attributes:
        subset: the patches that are left here, None where all are.
    """

    def __init__(
        self,
        reduction: TokenReduction,
        grid: _Grid,
        tables: tuple[Tensor, Tensor] | None,
        class_index: Callable[[int], int] | None,
        checkpointed: bool,
        cells: Tensor | None = None,
    ) -> None:
        self._reduction, self._grid, self._tables, self._checkpointed = reduction, grid, tables, checkpointed
        self._patches = grid[0] * grid[1]
        self._place_of = class_index
        self._class = None if class_index is None else class_index(self._patches if cells is None else cells.shape[1])
        self._cells: Tensor | None = None  # (b, l) the cell of each token, -1 for a class token; None: all are there
        self.subset: Subset | None = None  # the same, for orders of a grid
        if cells is not None:
            self._lose(self._with_class_token(cells))
        self._owner: Tensor | None = None  # (b, patches) of each cell, the patch that it was merged into
        self._size: Tensor | None = None  # (b, patches left, 1) how many tokens were merged into each
        self._evidence: Tensor | None = None  # of the block in front: scores (b, l), or what it adds (b, l, c)

    def through(self, i: int, block: Any, x: Tensor, branch: bool) -> tuple[Tensor, Tensor]:
        """The tokens behind block i, in front of which some may leave, and the feature there.

        That is the tokens, or with ``branch`` what the block adds to them.
        """
        amount = self._reduction.schedule.get(i)
        if amount is not None and self._evidence is not None:
            x = self._reduced(x, amount)
        if self._tables is not None:
            x = rotate(x, *self._tables_here())
        # A sequence of fewer patches is a grid of one row.
        grid = self._grid if self._cells is None else (1, x.shape[1] - (self._class is not None))
        gaps, observed = self._gaps(block), i + 1 in self._reduction.schedule
        if gaps is None and not observed and not branch:
            x = run_block(block, x, grid, self.subset, checkpointed=self._checkpointed)
            return x, x
        seen: list[tuple[Tensor, Tensor | None]] = []
        run = partial(self._run, gaps, observed, seen)
        x = run_block(block, x, grid, self.subset, run, checkpointed=self._checkpointed)
        added, self._evidence = seen[0]  # backward may have the block run again
        return x, added if branch else x

    def _run(
        self,
        gaps: Tensor | None,
        observed: bool,
        seen: list[tuple[Tensor, Tensor | None]],
        block: Any,
        x: Tensor,
        grid: _Grid,
        subset: Subset | None,
    ) -> Tensor:
        pruning = self._reduction.mode == "prune"
        per_order = observed and pruning and self._reduction.score == "out"
        gated = None
        if gaps is not None:
            branch, gated = block.mixer(block.norm(x), grid, per_order=True, gaps=gaps, subset=subset)
        elif per_order:
            branch, gated = block.mixer(block.norm(x), grid, per_order=True, subset=subset)
        else:
            branch = block.branch(x, grid, subset)
        evidence = None
        if observed:
            evidence = branch.detach()
            if gated is not None and per_order:
                along_sequence = getattr(block.mixer, "directions", None) is not None
                evidence = gated.detach()[:, :, -1 if along_sequence else 0 :].sum((2, 3))
            elif pruning:
                evidence = evidence.norm(dim=-1)
        seen.append((branch, evidence))
        return block.join(x, branch, grid, subset)

    def _lose(self, cells: Tensor) -> None:
        self._cells = cells
        self.subset = Subset(self._grid, without(cells, self._class), self._class)

    def _reduced(self, x: Tensor, amount: float) -> Tensor:
        patches = x.shape[1] - (self._class is not None)
        central = self._place_of is not None and self._place_of(2) == 1
        kept = self._reduction.kept_patches(patches, amount, central)
        if kept == patches:
            return x
        cells = self._cells_here(x)
        index, x = (self._pruned if self._reduction.mode == "prune" else self._merged)(x, kept)
        self._lose(cells.gather(1, index))
        return x

    def _pruned(self, x: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        assert self._evidence is not None
        scores = self._evidence
        if self._reduction.mirrored:
            scores = scores.flip(1)
        if self._class is not None:
            protected = slice(0, 1) if self._reduction.mirrored else slice(None)
            scores = scores.clone()
            scores[protected, self._class] = -math.inf
        index = scores.argsort(dim=1, descending=True, stable=True)[:, :kept].sort(1).values
        if self._class is not None and self._place_of is not None:
            old, self._class = self._class, self._place_of(kept)
            index = inserted(index, torch.full_like(index[:, :1], old), self._class)
        return index, tokens_at(x, index)

    def _merged(self, x: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        assert self._evidence is not None
        tokens, place = x.shape[1], self._class
        metric, patches = without(self._evidence, place), without(x, place)
        count = patches.shape[1]
        away = count - kept
        metric = F.normalize(metric, dim=-1)
        alike, partner = (metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)).max(-1)
        order = alike.argsort(dim=1, descending=True, stable=True)[:, :away]
        source, target = 2 * order, 2 * partner.gather(1, order) + 1

        size = torch.ones_like(patches[..., :1]) if self._size is None else self._size
        sums = patches * size
        sums = sums.scatter_add(1, _wide(target, sums), tokens_at(sums, source))
        size = size.scatter_add(1, target.unsqueeze(-1), tokens_at(size, source))
        gone = torch.zeros_like(patches[..., 0], dtype=torch.int32).scatter(1, source, 1)
        index = gone.argsort(dim=1, stable=True)[:, :kept]
        rank = (1 - gone).cumsum(1) - 1  # of those that stay
        moved_to = rank.scatter(1, source, rank.gather(1, target))
        self._owner = moved_to if self._owner is None else moved_to.gather(1, self._owner)
        self._size = tokens_at(size, index)
        merged = tokens_at(sums / size, index)
        if place is None:
            return index, merged
        index = index + (index >= place)
        self._class = place * (tokens - away) // tokens
        index = inserted(index, torch.full_like(index[:, :1], place), self._class)
        return index, inserted(merged, x[:, place : place + 1], self._class)

    def end(self, x: Tensor) -> Tensor:
        """The last tokens (b, l, c), the class token where the head looks for it."""
        if self._class is None or self._place_of is None:
            return x
        patches, token = self.split(x)
        assert token is not None
        return inserted(patches, token, self._place_of(patches.shape[1]))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The patches that are left (b, l, c) and the class token (b, 1, c)."""
        return without(x, self._class), None if self._class is None else x[:, self._class : self._class + 1]

    def on_grid(self, patches: Tensor) -> Tensor:
        """Patches of `split` as those of all cells (b, height * width, c)."""
        return patches if self.subset is None else tokens_at(patches, self.owner())

    def owner(self) -> Tensor:
        """Of each cell, which of the patches that are left it was merged into, or is nearest to it: (b, cells)."""
        assert self.subset is not None
        return self._nearest(self.subset.cells) if self._owner is None else self._owner

    def _nearest(self, cells: Tensor) -> Tensor:
        """Of each cell, which of the tokens at ``cells`` (b, l) is nearest, the first of several: (b, cells)."""
        width = self._grid[1]
        every = torch.arange(self._patches, device=cells.device)
        rows = (every // width)[:, None] - (cells // width)[:, None]
        columns = (every % width)[:, None] - (cells % width)[:, None]
        distance = (rows.square() + columns.square()).masked_fill((cells < 0)[:, None], torch.iinfo(cells.dtype).max)
        return distance.argmin(-1)

    def _cells_here(self, x: Tensor) -> Tensor:
        if self._cells is not None:
            return self._cells
        return self._with_class_token(torch.arange(self._patches, device=x.device).expand(x.shape[0], -1))

    def _with_class_token(self, cells: Tensor) -> Tensor:
        return cells if self._class is None else inserted(cells, torch.full_like(cells[:, :1], -1), self._class)

    def _tables_here(self) -> tuple[Tensor, Tensor]:
        assert self._tables is not None
        cos, sin = self._tables
        if self._cells is None:
            return cos, sin
        rows = self._cells
        if self._place_of is not None:
            place = self._place_of(self._patches)
            rows = torch.where(rows < 0, place, rows + (rows >= place))
        return cos[rows], sin[rows]

    def _gaps(self, block: Any) -> Tensor | None:
        """(b, l, k) dropped tokens in front of each token on the way of each order; a class token takes no part."""
        if self._reduction.align is None or self._cells is None:
            return None
        cells = without(self._cells, self._class)
        start, end = torch.full_like(cells[:, :1], -1), torch.full_like(cells[:, :1], self._patches)
        steps = torch.diff(cells, prepend=start, append=end) - 1  # between two tokens, and at both ends
        gaps = torch.stack([steps[:, :-1] if way > 0 else steps[:, 1:] for way in block.mixer.directions], dim=-1)
        if self._class is None:
            return gaps
        return inserted(gaps, torch.zeros_like(gaps[:, :1]), self._class)


def _wide(index: Tensor, like: Tensor) -> Tensor:
    return index.unsqueeze(-1).expand(-1, -1, like.shape[-1])


def inserted(x: Tensor, token: Tensor, place: int) -> Tensor:
    """Tokens with one more, (b, 1, ...), at ``place``."""
    return torch.cat([x[:, :place], token, x[:, place:]], dim=1)


def without(x: Tensor, place: int | None) -> Tensor:
    """Tokens but the one at ``place``."""
    return x if place is None else torch.cat([x[:, :place], x[:, place + 1 :]], dim=1)
