"""The mixer of MSVMamba: one scan of the whole map, and one that walks a map of half its resolution."""

from functools import reduce
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers.line import Line, are_whole
from backbones.layers.norm import LayerNorm
from backbones.layers.resolution import channels_first, channels_last
from backbones.layers.scan import Scan
from backbones.layers.selective_ssm import SelectiveSSM
from backbones.layers.shapes import bottleneck_width, check_map, inner_width, input_width
from backbones.layers.ss2d import DepthwiseConv2d, scan_grid
from backbones.layers.tracing import Opaque
from backbones.ops import silu_gate
from backbones.ops.dispatch import kernels
from backbones.ops.fused.gate.operator import excited_gate
from backbones.ops.fused.row_sums.operator import has_row_sums_kernel, row_sums
from backbones.ops.scan.projected import joined
from backbones.ops.tracing import is_as_written, is_hooked, is_replaced
from backbones.patterns import MULTI_SCALE, ScanPattern
from backbones.patterns.resampling import upsampling
from backbones.patterns.taps import window_taps

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
        return x * torch.sigmoid(self.logits(x))[:, None, None]

    def logits(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, dim), of which the sigmoid is the gate."""
        return self.fc2(F.relu(self.fc1(x.mean((1, 2)))))


class MultiScaleSS2D(Opaque, nn.Module):
    """A scan at full and a scan at half resolution, added, squeezed and excited, gated (MSVMamba, section 4).

    The defaults are those of the first version. The NeurIPS version has ``ssm_ratio=1.0, branch_norm=False,
    upsampling="nearest"``, and a gate in the base model only.

    Args:
        dim: width of the map.
        scan: the walk over the half-resolution map; window and backend of both scans.
        d_state: states of each channel.
        ssm_ratio: inner width over ``dim``.
        gated: multiply by SiLU(z), z a second projection of the input.
        branch_norm: normalise every step of each scan, before they are added; else normalise their sum.
        upsampling: "bilinear" or "nearest".

    Raises:
        ValueError: ``branch_norm`` with a pattern that is not a sequence of walks over the whole map; one of several
            orders; fewer than 8 inner channels; in ``forward``, another shape.
    """

    prunable: ClassVar[tuple[str, ...]] = ("out_proj",)

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
        d_inner = inner_width(dim, ssm_ratio, "ssm_ratio")
        self.dim, self.scan = dim, scan.of_one_order()
        self.gated, self.branch_norm, self.upsampling = gated, branch_norm, upsampling
        self.walks = _number_of_walks(scan.pattern) if branch_norm else 0
        self.in_proj = nn.Linear(dim, 2 * d_inner if gated else d_inner, bias=False, **dd)
        self.conv_full = DepthwiseConv2d(d_inner, silu=True, **dd)
        self.conv_low = DepthwiseConv2d(d_inner, 7, stride=2, silu=True, **dd)
        dt_rank = -(-dim // 16)
        self.ssm_full = SelectiveSSM(d_inner, d_state, dt_rank, 1, scan.backend, **dd)
        self.ssm_low = SelectiveSSM(d_inner, d_state, dt_rank, 1, scan.backend, **dd)
        self.out_norm = LayerNorm(d_inner, autocast_out=True, **dd)
        self.se = SqueezeExcite(d_inner, bottleneck_width(d_inner, 8), **dd)
        self.out_proj = nn.Linear(d_inner, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, h, w, dim)."""
        check_map(x, input_width(self.in_proj, self.dim))
        x, z = self.in_proj(x).chunk(2, dim=-1) if self.gated else (self.in_proj(x), None)
        full, low = self.conv_full(x), self.conv_low(x)
        y = self._joined(full, low) if self.branch_norm else None
        if y is None:
            full = self.ssm_full(full.flatten(1, 2), local_window=self.scan.window(full.shape[1] * full.shape[2]))
            full = full.unflatten(1, x.shape[1:3])
            y = self._merged(self.out_norm(full), low) if self.branch_norm else self.out_norm(self._merged(full, low))
        return self.out_proj(self._gated(y, z))

    def add_to(self, line: Line, x: Tensor) -> None:
        """The layer, of a map like ``x``, as steps of a block's line."""
        check_map(x, input_width(self.in_proj, self.dim))
        line.linear(self.in_proj)
        if self.gated:
            line.split()
        line.add(self._scan_step(line, *x.shape[1:3]))
        line.add(self._excite_step(line))
        line.linear(self.out_proj)

    def _scan_step(self, line: Line, height: int, width: int) -> Any:
        sides = self.scanned_grid("ssm_low", height, width)
        windows = self.scan.window(height * width), self.scan.window(sides[0] * sides[1])
        if not self.branch_norm or max(windows) > 1:
            return None
        full, low = line.scan_weights(self.ssm_full), line.scan_weights(self.ssm_low)
        first, second = (
            line.weights(conv, DepthwiseConv2d, "weight", "bias") for conv in (self.conv_full, self.conv_low)
        )
        norm = line.weights(self.out_norm, LayerNorm, "weight", "bias")
        if full is None or low is None or first is None or second is None or norm is None or norm[0] is None:
            return None
        halves, others = (*full[:2], *low[:2]), (*full[2:], *first, *low[2:], *second)
        if not line.fits(*halves) or not are_whole(*others):
            return None
        scan, device = kernels("steps").ConvolvedScan, line.x.device
        order, visits, _ = self.scan.pattern.tables(*sides, device)
        if visits is None:
            return None
        branches = (
            scan(*window_taps(height, width, 3, device=device), None, "per_step", 0, None),
            scan(*window_taps(height, width, 7, 2, device=device), order, "per_step", 0, visits),
        )
        sizes = height * width, order.shape[1]
        tables = upsampling(sides, (height, width), self.upsampling, self.scan.pattern, True, device)
        dtype = line.half or line.x.dtype
        make = kernels("multi_scale_steps").TwoScales
        return make((*halves, *others, *norm), branches, sizes, tables, self.out_norm.eps, dtype)

    def _excite_step(self, line: Line) -> Any:
        layers = [line.weights(layer, nn.Linear, "weight", "bias") for layer in (self.se.fc1, self.se.fc2)]
        if type(self.se) is not SqueezeExcite or not is_as_written(self.se):
            return None
        weights = [weights[0] for weights in layers if weights is not None and weights[1] is None]
        return kernels("multi_scale_steps").Excite(weights) if len(weights) == 2 and line.fits(*weights) else None

    def scanned_grid(self, layer: str, height: int, width: int) -> tuple[int, int]:
        """Sides of the map that ``layer``, "ssm_full" or "ssm_low", scans in a map of ``height`` x ``width``."""
        return (height, width) if layer == "ssm_full" else (-(-height // 2), -(-width // 2))

    def _joined(self, full: Tensor, low: Tensor) -> Tensor | None:
        """Both scans normalised and added, where kernels of a GPU write their steps behind one another: else None."""
        if any([is_hooked(ssm) or is_replaced(ssm) for ssm in (self.ssm_full, self.ssm_low)]):
            return None
        b, rows, columns, c = full.shape
        height, width = low.shape[1:3]
        order, visits, _ = self.scan.pattern.tables(height, width, low.device)
        windows = self.scan.window(rows * columns), self.scan.window(height * width)
        u, v = full.flatten(1, 2), low.flatten(1, 2)
        if (
            max(windows) > 1
            or not self.ssm_full.is_one_operation(u)
            or not self.ssm_low.is_one_operation(v, order, visits)
            or not has_row_sums_kernel(u, None, self.ssm_low.backend)
        ):
            return None
        sizes = [rows * columns, order.shape[1]]
        steps = u.new_empty(b, sum(sizes), 1, c)
        into = steps.split_with_sizes(sizes, 1)
        of_full = self.ssm_full.projected(u, None, "per_step", None, into=into[0])
        of_low = self.ssm_low.projected(v, order, "per_step", visits, into=into[1])
        normed = self.out_norm(joined(steps, (of_full, of_low)).squeeze(2))
        tables = upsampling((height, width), (rows, columns), self.upsampling, self.scan.pattern, True, full.device)
        return row_sums(normed, None, tables, backend=self.ssm_low.backend).view(full.shape)

    def _merged(self, full: Tensor, low: Tensor) -> Tensor:
        """``full`` and the scan of ``low``, brought to its resolution."""
        (height, width), size = low.shape[1:3], (full.shape[1], full.shape[2])
        scanned = self._steps(low) if self.branch_norm else scan_grid(self.ssm_low, low, self.scan).flatten(1, 2)
        if has_row_sums_kernel(scanned, full, self.ssm_low.backend):
            pattern = self.scan.pattern if self.branch_norm else None
            tables = upsampling((height, width), size, self.upsampling, pattern, device=full.device)
            return row_sums(scanned, full.flatten(1, 2), tables, backend=self.ssm_low.backend).view(full.shape)
        if self.branch_norm:
            scanned = self._by_cell(scanned, height, width)
        scanned = channels_first(scanned.unflatten(1, (height, width)))
        return full + channels_last(F.interpolate(scanned, size, mode=self.upsampling))

    def _gated(self, y: Tensor, z: Tensor | None) -> Tensor:
        backend = self.ssm_full.backend
        if not is_hooked(self.se) and not is_replaced(self.se):
            cells = None if z is None else z.flatten(1, 2)
            return excited_gate(y.flatten(1, 2), self.se.logits(y), cells, backend=backend).view(y.shape)
        y = self.se(y)
        return y if z is None else silu_gate(y, z, backend=backend)

    def _steps(self, x: Tensor) -> Tensor:
        """The scan of ``x``, every step of it normalised, (b, steps, d_inner)."""
        height, width = x.shape[1:3]
        order, visits, _ = self.scan.pattern.tables(height, width, x.device)
        window = self.scan.window(height * width)
        y = self.ssm_low(x.flatten(1, 2), order, "per_step", window, visits)
        return self.out_norm(y.squeeze(2))

    def _by_cell(self, y: Tensor, height: int, width: int) -> Tensor:
        """Adds the steps of one cell by gathering: scattering is not deterministic."""
        order, _, _ = self.scan.pattern.tables(height, width, y.device)
        y = y.unflatten(1, (self.walks, height * width))
        steps = order.view(self.walks, height * width).argsort(1)
        return reduce(torch.add, (y[:, walk].index_select(1, steps[walk]) for walk in range(self.walks)))


def _number_of_walks(pattern: ScanPattern) -> int:
    """How many walks over the whole grid the pattern strings together, read off a small grid."""
    walks = pattern.orders(5, 6)[0].split(30)
    if any(walk.sort().values.tolist() != list(range(30)) for walk in walks):
        raise ValueError(f"pattern: {pattern.name!r} does not walk over all cells, once or several times in turn")
    return len(walks)
