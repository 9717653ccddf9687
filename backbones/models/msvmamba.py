"""MSVMamba: one scan of the full map, and one recurrence that walks a map of half its resolution three times.

Multi-Scale VMamba: Hierarchy in Hierarchy Visual State Space Model, arXiv:2405.14174.
Original: https://github.com/YuHengsss/MSVMamba, which states no licence. Written from the paper and from
measurements of the original, without its code.

Of VMamba's four scans, only the row-major one keeps the full resolution. The other three read a map that a
strided convolution has halved, and follow one another as a single sequence: the state goes on from the end
of one walk to the start of the next, and the three share their parameters. Squeeze-and-excitation and a
convolutional feed-forward layer mix channels. The NeurIPS version ("msvmambav3") is as wide inside as
outside, has wider feed-forward layers that are normalised after instead of before, one norm of both scans'
sum instead of one for each, nearest instead of bilinear upsampling, and, but for the base model, no gate.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from backbones.base import HierarchicalBackbone, build_model
from backbones.layers import (
    ConvDownsample,
    ConvFFN,
    ConvStem,
    DepthwiseConv2d,
    LayerNorm,
    PatchMerging,
    PatchStem,
    Scan,
    SelectiveSSM,
    scan_grid,
)
from backbones.layers.key_rules import (
    BLOCKS,
    CLASSIFIER,
    CONV_DOWNSAMPLE,
    CONV_STEM,
    LINEAR,
    PATCH_MERGING,
    PATCH_STEM,
    POINTWISE,
    grouped,
)
from backbones.layers.resolution import channels_first, channels_last
from backbones.layers.tracing import Opaque
from backbones.layers.vss_block import VSSBlock
from backbones.ops import silu_gate
from backbones.patterns import MULTI_SCALE, ScanPattern
from backbones.weights import WEIGHT_KEYS, KeyRule, Layout
from backbones.zoo import default_cfgs as zoo_cfgs

_MULTI_SCALE = Scan(MULTI_SCALE)


class SqueezeExcite(nn.Module):
    """Scales the channels of a map (b, h, w, dim) by a gate computed from their means, with no biases."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, bias=False, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, h, w, dim)."""
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((1, 2))))))
        return x * gate[:, None, None]


class MultiScaleSS2D(Opaque, nn.Module):
    """A scan at full and a scan at half resolution, added, squeezed and excited, gated (MSVMamba, section 4).

    Args:
        dim: width of the map.
        scan: the walk over the half-resolution map; window and backend of both scans.
        d_state: states of each channel.
        ssm_ratio: inner width over ``dim``.
        gated: multiply by SiLU(z), z a second projection of the input.
        branch_norm: normalise every step of each scan, before they are added; else normalise their sum.
        upsampling: "bilinear" or "nearest".

    Raises:
        ValueError: ``branch_norm`` with a pattern that is not a sequence of walks over the whole map.
    """

    def __init__(
        self,
        dim: int,
        scan: Scan = _MULTI_SCALE,
        d_state: int = 1,
        ssm_ratio: float = 2.0,
        gated: bool = True,
        branch_norm: bool = True,
        upsampling: str = "bilinear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        d_inner = int(ssm_ratio * dim)
        self.scan = scan
        self.gated, self.branch_norm, self.upsampling = gated, branch_norm, upsampling
        self.walks = _number_of_walks(scan.pattern) if branch_norm else 0
        self.in_proj = nn.Linear(dim, 2 * d_inner if gated else d_inner, bias=False, **dd)
        self.conv_full = DepthwiseConv2d(d_inner, silu=True, **dd)
        self.conv_low = DepthwiseConv2d(d_inner, 7, stride=2, silu=True, **dd)
        dt_rank = -(-dim // 16)
        self.ssm_full = SelectiveSSM(d_inner, d_state, dt_rank, 1, scan.backend, **dd)
        self.ssm_low = SelectiveSSM(d_inner, d_state, dt_rank, 1, scan.backend, **dd)
        self.out_norm = LayerNorm(d_inner, **dd)
        self.se = SqueezeExcite(d_inner, d_inner // 8, **dd)
        self.out_proj = nn.Linear(d_inner, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, h, w, dim)."""
        x, z = self.in_proj(x).chunk(2, dim=-1) if self.gated else (self.in_proj(x), None)
        full, low = self.conv_full(x), self.conv_low(x)
        full = self.ssm_full(full.flatten(1, 2), local_window=self.scan.window(full.shape[1] * full.shape[2]))
        full = full.unflatten(1, x.shape[1:3])
        if self.branch_norm:
            y = self.out_norm(full) + self._upsample(self._scan_and_norm(low), full)
        else:
            low = scan_grid(self.ssm_low, low, self.scan)
            y = self.out_norm(full + self._upsample(low, full))
        y = self.se(y)
        return self.out_proj(y if z is None else silu_gate(y, z, backend=self.ssm_full.backend))

    def scanned_grid(self, layer: str, height: int, width: int) -> tuple[int, int]:
        """Sides of the map that ``layer``, "ssm_full" or "ssm_low", scans in a map of ``height`` x ``width``."""
        return (height, width) if layer == "ssm_full" else (-(-height // 2), -(-width // 2))

    def _scan_and_norm(self, x: Tensor) -> Tensor:
        """Normalises every step, and adds those of one cell by gathering: scattering is not deterministic."""
        height, width = x.shape[1:3]
        pattern, window = self.scan.pattern, self.scan.window(height * width)
        order, visits = pattern.orders(height, width, x.device), pattern.visits(height, width)
        y = self.ssm_low(x.flatten(1, 2), order, "per_step", window, visits)
        y = self.out_norm(y.squeeze(2)).unflatten(1, (self.walks, height * width))
        steps = order.view(self.walks, height * width).argsort(1)
        y = reduce(torch.add, (y[:, walk].index_select(1, steps[walk]) for walk in range(self.walks)))
        return y.unflatten(1, (height, width))

    def _upsample(self, x: Tensor, like: Tensor) -> Tensor:
        size = (like.shape[1], like.shape[2])
        return channels_last(F.interpolate(channels_first(x), size, mode=self.upsampling))


def _number_of_walks(pattern: ScanPattern) -> int:
    """How many walks over the whole grid the pattern strings together, read off a small grid."""
    walks = pattern.orders(5, 6)[0].split(30)
    if any(walk.sort().values.tolist() != list(range(30)) for walk in walks):
        raise ValueError(f"pattern: {pattern.name!r} does not walk over all cells, once or several times in turn")
    return len(walks)


# Two groups stacked, of which each scan takes one, as its only order.
_SPLIT = Layout(lambda x: x.unsqueeze(1), lambda x: x.squeeze(1))


def _block_rules(*groups: str) -> tuple[KeyRule, ...]:
    """Rules of a block; ``groups`` names the scan of each official parameter group."""
    theirs, ours = "layers.{}.blocks.{}.", "stages.{}.blocks.{}."
    by_group = grouped(2, 1, -1)

    def unbound(name: str) -> tuple[str, ...]:
        return tuple(f"{ours}mixer.{group}.{name}" for group in groups)

    return (
        KeyRule(theirs + "op.x_proj_weight", unbound("x_proj_weight"), _SPLIT),
        KeyRule(theirs + "op.dt_projs_weight", unbound("dt_proj_weight"), _SPLIT),
        KeyRule(theirs + "op.dt_projs_bias", unbound("dt_proj_bias"), _SPLIT),
        KeyRule(theirs + "op.A_logs", unbound("A_log"), by_group),
        KeyRule(theirs + "op.Ds", unbound("D"), by_group),
        KeyRule(theirs + "op.in_proj.weight", ours + "mixer.in_proj.weight", LINEAR),
        KeyRule(theirs + "op.out_proj.weight", ours + "mixer.out_proj.weight", LINEAR),
        KeyRule(theirs + "op.conv2d.{}", ours + "mixer.conv_full.{}"),
        KeyRule(theirs + "op.conv2d_b1.{}", ours + "mixer.conv_low.{}"),
        KeyRule(theirs + "op.se.fc.0.{}", ours + "mixer.se.fc1.{}"),
        KeyRule(theirs + "op.se.fc.2.{}", ours + "mixer.se.fc2.{}"),
        KeyRule(theirs + "op.{*}", ours + "mixer.{*}"),
        KeyRule(theirs + "convFFN.linear1.weight", ours + "mlp.fc1.weight", POINTWISE),
        KeyRule(theirs + "convFFN.linear2.weight", ours + "mlp.fc2.weight", POINTWISE),
        KeyRule(theirs + "convFFN.linear1.bias", ours + "mlp.fc1.bias"),
        KeyRule(theirs + "convFFN.linear2.bias", ours + "mlp.fc2.bias"),
        KeyRule(theirs + "convFFN.dwc.{}", ours + "mlp.dwconv.{}"),
        *BLOCKS,
    )


class MSVMamba(HierarchicalBackbone):
    """MSVMamba as first published. See :class:`backbones.base.HierarchicalBackbone` for its arguments."""

    key_rules = (*PATCH_STEM, *PATCH_MERGING, *_block_rules("ssm_low", "ssm_full"), *CLASSIFIER)

    def init_weights(self) -> None:
        """The feed-forward layers are convolutions in the original, and drawn as such."""
        super().init_weights()
        for module in self.modules():
            if isinstance(module, ConvFFN):
                module.fc1.reset_parameters()
                module.fc2.reset_parameters()


class MSVMambaV3(MSVMamba):
    """MSVMamba's NeurIPS version. See :class:`backbones.base.HierarchicalBackbone` for its arguments."""

    key_rules = (*CONV_STEM, *CONV_DOWNSAMPLE, *_block_rules("ssm_full", "ssm_low"), *CLASSIFIER)
    weight_keys = ("model_ema", *WEIGHT_KEYS)  # what this branch of the original evaluates


def _create_msvmamba(
    variant: str,
    pretrained: bool = False,
    *,
    d_state: int = 1,
    ssm_ratio: float = 2.0,
    mlp_ratio: float = 2.0,
    **kwargs: Any,
) -> nn.Module:
    scan = Scan.pop(kwargs, MULTI_SCALE)
    mixer = partial(MultiScaleSS2D, scan=scan, d_state=d_state, ssm_ratio=ssm_ratio)
    block = partial(VSSBlock, mixer=mixer, mlp=partial(ConvFFN, residual=True), mlp_ratio=mlp_ratio)
    parts: dict[str, Any] = {"stem": PatchStem, "block": block, "downsample": PatchMerging}
    return build_model(MSVMamba, variant, pretrained, scan=scan, **parts, **kwargs)


def _create_msvmambav3(
    variant: str,
    pretrained: bool = False,
    *,
    d_state: int = 1,
    ssm_ratio: float = 1.0,
    mlp_ratio: float = 4.0,
    gated: bool = False,
    **kwargs: Any,
) -> nn.Module:
    scan, mlp = Scan.pop(kwargs, MULTI_SCALE), partial(ConvFFN, residual=True)
    published = partial(MultiScaleSS2D, branch_norm=False, upsampling="nearest")
    mixer = partial(published, scan=scan, d_state=d_state, ssm_ratio=ssm_ratio, gated=gated)
    block = partial(VSSBlock, mixer=mixer, mlp=mlp, mlp_ratio=mlp_ratio, mlp_post_norm=True)
    parts: dict[str, Any] = {"stem": ConvStem, "block": block, "downsample": ConvDownsample}
    return build_model(MSVMambaV3, variant, pretrained, scan=scan, **parts, **kwargs)


default_cfgs = generate_default_cfgs(zoo_cfgs("msvmamba"))


@register_model
def msvmamba_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MSVMamba-N, 7 M parameters."""
    args = {"depths": (1, 2, 5, 2), "dims": (48, 96, 192, 384)}
    return _create_msvmamba("msvmamba_nano", pretrained, **dict(args, **kwargs))


@register_model
def msvmamba_micro(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MSVMamba-M, 12 M parameters."""
    args = {"depths": (1, 2, 5, 2), "dims": (64, 128, 256, 512)}
    return _create_msvmamba("msvmamba_micro", pretrained, **dict(args, **kwargs))


@register_model
def msvmamba_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MSVMamba-T, 33 M parameters."""
    args = {"depths": (1, 2, 9, 2), "dims": (96, 192, 384, 768)}
    return _create_msvmamba("msvmamba_tiny", pretrained, **dict(args, **kwargs))


@register_model
def msvmambav3_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MSVMamba-T of the NeurIPS version, 32 M parameters."""
    args = {"depths": (2, 2, 9, 2), "dims": (96, 192, 384, 768)}
    return _create_msvmambav3("msvmambav3_tiny", pretrained, **dict(args, **kwargs))


@register_model
def msvmambav3_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MSVMamba-S of the NeurIPS version, 50 M parameters."""
    args = {"depths": (2, 3, 20, 2), "dims": (96, 192, 384, 768)}
    return _create_msvmambav3("msvmambav3_small", pretrained, **dict(args, **kwargs))


@register_model
def msvmambav3_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MSVMamba-B of the NeurIPS version, 91 M parameters, gated."""
    args = {"depths": (2, 4, 18, 2), "dims": (128, 256, 512, 1024), "gated": True}
    return _create_msvmambav3("msvmambav3_base", pretrained, **dict(args, **kwargs))
