"""Every family as an OpenMMLab backbone: maps (b, c, h, w) for the necks and heads of mmdet and mmseg."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, ClassVar, cast

import timm
from mmengine.logging import MMLogger
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from backbones.base import Backbone, PlainBackbone
from backbones.layers.constructor import Constructor
from backbones.layers.norm import RMSNorm
from backbones.mm.errors import UserError
from backbones.mm.models.frozen import freeze_stages, keep_statistics
from backbones.models import FAMILIES, GUESTS
from backbones.suggest import did_you_mean
from backbones.weights import CheckpointError, KeyRule, files, loading, rules, sources

_NORMS: dict[str, Constructor] = {"rmsnorm": RMSNorm, "layernorm": nn.LayerNorm}


class DenseBackbone(BaseModule):
    """Features of a registered model, each with a norm of its own, unless the stage itself ends in one.

    Args:
        arch: registered name, such as "vmamba_tiny_s1l8".
        out_indices: stages (blocks of a plain model) whose outputs are returned, in this order; None are all stages.
        drop_path_rate: stochastic depth of the last block.
        frozen_stages: -1 trains everything, 0 freezes the stem, i also the first i stages (blocks).
        norm_eval: keep batch norms in eval mode, with the statistics that they have.
        with_cp: compute blocks again in backward instead of keeping their activations.
        out_norm: put a norm on every output, as the family's authors do; False returns the maps as they are.
        taps: "output" returns the maps that the stages end with; "input" those that they begin with, and behind them
            the last stage's output, for VM-UNet. It takes all stages of a hierarchy, and no ``out_norm``.
        model_args: further arguments of ``timm.create_model``.
        init_cfg: ``dict(type="Pretrained", checkpoint=...)`` loads the weights of a classifier or of a
            backbone, in the official layout or in ours, when ``init_weights`` is called: see
            :func:`backbones.weights.sources.locate`; "published" are those that the authors of ``arch`` released.

    Raises:
        UserError: ``arch`` is not a model of this family, or an index is out of range.
    """

    family: ClassVar[type[Backbone]]
    """Class of the family's models."""
    own_parts: ClassVar[tuple[str, ...]] = ("out_norms.",)
    """How the names of what stands around the model begin."""

    def __init__(
        self,
        arch: str,
        out_indices: Sequence[int] | None = None,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        out_norm: bool = True,
        model_args: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
        taps: str = "output",
    ) -> None:
        super().__init__(init_cfg)
        known = timm.list_models(module=self.family.__module__.rpartition(".")[2])
        if not known:
            raise UserError(f"arch: timm {timm.__version__} is too old to have a model of {type(self).__name__}")
        if arch not in known:
            raise UserError(f"arch: {arch!r} is no model of {type(self).__name__}{did_you_mean(arch, known)}")
        self.arch, self.frozen_stages, self.norm_eval = arch, frozen_stages, norm_eval
        self._model_args = {"drop_path_rate": drop_path_rate, **(model_args or {})}
        self.model = cast(Any, self.family.create(arch, **self._model_args))
        info = self.model.feature_info
        self.out_indices = _checked_indices(range(len(info)) if out_indices is None else out_indices, len(info))
        if taps not in ("output", "input"):
            raise UserError(f"taps: got {taps!r}, expected 'output' or 'input'")
        if taps == "input" and (out_norm or self.out_indices != tuple(range(len(info)))):
            raise UserError(f"taps: got 'input', expected with it out_norm=False and all {len(info)} stages in order")
        self.taps = taps
        if not isinstance(frozen_stages, Integral) or not -1 <= frozen_stages <= len(info):
            raise UserError(f"frozen_stages: got {frozen_stages}, expected a number within -1..{len(info)}")
        self.model.prune_intermediate_layers(list(self.out_indices), prune_norm=True)
        self.model.set_grad_checkpointing(with_cp)
        self.out_norms: nn.ModuleDict = nn.ModuleDict(
            {
                str(i): self.family.dense_norm(info[i]["num_chs"])
                for i in self.out_indices
                if out_norm and not self._ends_in_norm(i)
            }
        )
        self.train()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image (b, in_chans, h, w) to one map (b, c, h / stride, w / stride) for each of ``out_indices``."""
        if self.taps == "input":
            bottom, features = self.model.forward_intermediates(x, output_fmt="NHWC", tap="input")
            return tuple(x.permute(0, 3, 1, 2).contiguous() for x in (*features, bottom))
        maps = []
        for i, feature in zip(self.out_indices, self._features(x), strict=True):
            if str(i) in self.out_norms:
                feature = self.out_norms[str(i)](feature)
            maps.append(feature.permute(0, 3, 1, 2).contiguous())
        return tuple(maps)

    def train(self, mode: bool = True) -> DenseBackbone:
        """Sets training mode, except in what is frozen and, with ``norm_eval``, in batch norms."""
        super().train(mode)
        if self.frozen_stages >= 0:
            freeze_stages(self.model, self.frozen_stages)
        if self.norm_eval:
            keep_statistics(self)
        return self

    def init_weights(self) -> None:
        """Loads the weights of ``init_cfg``; without it the model keeps its own initialisation."""
        self._is_init = True
        if self.init_cfg is None:
            return
        if self.init_cfg.get("type") != "Pretrained" or "checkpoint" not in self.init_cfg:
            raise UserError(f"init_cfg: got {self.init_cfg}, expected dict(type='Pretrained', checkpoint=...)")
        self.load_pretrained(self.init_cfg["checkpoint"])

    def load_pretrained(self, path: str) -> None:
        """Loads a weight file, a URL or the "published" weights in full.

        Only a classifier, its norm, and stages behind the last output may be left over; output norms that the
        file does not have keep their initialisation. The log lists both.

        Raises:
            CheckpointError: the file cannot be read, or weights are missing, unknown or misshapen; all named.
            UserError: the published weights must be downloaded by hand, or there are none.
        """
        file = fetch_weights(path, self.arch)
        whole = cast(Any, self.family.create(self.arch, device="meta", **self._model_args))
        read = files.read(file, whole.weight_keys)
        inside = loading.inside_backbone(read)
        fitted = loading.fit(read.renamed(inside), self.model, whole.pretrained_cfg)
        weights = rules.to_ours(fitted, self._norm_rules())
        weights = {x if x.startswith(self.own_parts) else f"model.{x}": value for x, value in weights.items()}
        # Beside the backbone stand a neck and heads, but inside of it nothing may be left over.
        around = sorted(read.keys() - set(inside.values()))
        part = "backbone." if any(name.startswith("backbone.") for name in read) else ""
        weights |= {name.removeprefix(part): read[name] for name in around if name.startswith(part)}
        own = self.state_dict()
        unused = sorted(weights.keys() & {f"model.{name}" for name in whole.state_dict()} - own.keys())
        fresh = [name for name in own if self._may_be_fresh(name)]
        fresh = loading.load(self, {name: x for name, x in weights.items() if name not in unused}, optional=fresh)

        logger = MMLogger.get_current_instance()
        logger.info("loaded %s into %s", file, self.arch)
        outside = [name for name in around if not name.startswith(part)]
        for what, names in (
            ("outside the backbone", outside),
            ("of no use in a backbone", unused),
            ("not in the file, left fresh", fresh),
        ):
            if names:
                logger.info("%s: %s", what, ", ".join(names))

    def _features(self, x: Tensor) -> list[Tensor]:
        """Channels-last maps, without their output norms."""
        return self.model.forward_intermediates(
            x, indices=list(self.out_indices), output_fmt="NHWC", intermediates_only=True
        )

    def _norm_rules(self) -> tuple[KeyRule, ...]:
        """Names of the output norms in the authors' dense models, applied after the model's own rules."""
        absent = tuple(f"out_norms.{i}." for i in range(len(self.model.feature_info)) if str(i) not in self.out_norms)
        return tuple(x for x in self.model.dense_rules if not isinstance(x.ours, str) or not x.ours.startswith(absent))

    def _may_be_fresh(self, name: str) -> bool:
        """Whether the parameter ``name`` may be missing in a file and keep its initialisation."""
        return name.startswith(self.own_parts)

    def _ends_in_norm(self, index: int) -> bool:
        """Whether the model itself normalises the output ``index``."""
        return not isinstance(self.model.stages[index].norm, nn.Identity)


class PlainDenseBackbone(DenseBackbone):
    """Features of a plain model, all at one stride; a neck makes the pyramid.

    Takes images of any size: they are padded to whole patches, and the position embedding is resampled.

    Args:
        arch: as in :class:`DenseBackbone`, and all others.
        tap: "stream" returns the sum of all blocks so far, "branch" what the last block added to it; None is what the
            family's authors use for segmentation, "branch" in Vim, LBVim and LocalVim.
        norm_layer: "rmsnorm" or "layernorm", before each block; None is the family's own. A layer norm takes the scales
            of a file with RMS norms, and its biases start at 0, as in the authors' LBVim for segmentation.
    """

    family: ClassVar[type[PlainBackbone]]

    def __init__(
        self,
        arch: str,
        out_indices: Sequence[int] = (5, 11, 17, 23),
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        out_norm: bool = True,
        tap: str | None = None,
        norm_layer: str | None = None,
        model_args: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        tap = self.family.dense_tap if tap is None else tap
        if tap not in ("stream", "branch"):
            raise UserError(f"tap: got {tap!r}, expected 'stream' or 'branch'")
        if norm_layer not in (None, *_NORMS):
            raise UserError(f"norm_layer: got {norm_layer!r}, expected 'rmsnorm' or 'layernorm'")
        own_args: dict[str, Any] = {"dynamic_img_size": True, "dynamic_img_pad": True}
        if norm_layer is not None:
            own_args["norm_layer"] = _NORMS[norm_layer]
        super().__init__(
            arch, out_indices, drop_path_rate, frozen_stages, norm_eval, with_cp, out_norm,
            own_args | (model_args or {}), init_cfg,
        )  # fmt: skip
        self.tap = tap

    def _features(self, x: Tensor) -> list[Tensor]:
        features = self.model.forward_intermediates(
            x,
            indices=list(self.out_indices),
            output_fmt="NLC",
            intermediates_only=True,
            branch=self.tap == "branch",
        )
        grid = self.model.patch_embed.grid_size(*x.shape[-2:])
        return [feature.unflatten(1, grid) for feature in features]

    def _norm_rules(self) -> tuple[KeyRule, ...]:
        return self.model.dense_norm_rules(self.out_indices) if self.out_norms else ()

    def _ends_in_norm(self, index: int) -> bool:
        return False  # the tokens of blocks are the stream itself

    def _may_be_fresh(self, name: str) -> bool:
        return super()._may_be_fresh(name) or re.fullmatch(r"model\.blocks\.\d+\.norm\.bias", name) is not None


def fetch_weights(checkpoint: str, arch: str) -> str:
    """The weight file that ``checkpoint`` stands for, downloaded into a cache if it is not local.

    Args:
        checkpoint: see :func:`backbones.weights.sources.locate`.
        arch: registered name.

    Raises:
        UserError: there is no such file, or the weights cannot be downloaded.
    """
    hint = "set checkpoint to a file in init_cfg, or init_cfg=None to start from random weights"
    try:
        where = sources.locate(checkpoint, arch)
        return str(sources.fetch(where, where.get("architecture", arch), hint))
    except CheckpointError as error:
        raise UserError(f"checkpoint: {error}") from error


def _checked_indices(out_indices: Sequence[int], count: int) -> tuple[int, ...]:
    given = tuple(out_indices) if isinstance(out_indices, Iterable) else (out_indices,)
    if not given or not all(isinstance(i, Integral) and 0 <= i < count for i in given) or len({*given}) < len(given):
        raise UserError(f"out_indices: got {out_indices}, expected different numbers within 0..{count - 1}")
    return tuple(map(int, given))


def _backbone_of(family: type[Backbone]) -> type[DenseBackbone]:
    """The dense backbone of a family, under the family's name."""
    name = family.__name__
    base = PlainDenseBackbone if issubclass(family, PlainBackbone) else DenseBackbone
    doc = f"{name} for dense prediction; see :class:`{base.__name__}`."
    return type(name, (base,), {"__module__": __name__, "__doc__": doc, "family": family})


for _family in (*FAMILIES, *GUESTS):
    globals()[_family.__name__] = MODELS.register_module(module=_backbone_of(_family))
