"""The 2-D selective scan block of VMamba and its relatives, channels-last."""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers.constructor import Constructor
from backbones.layers.line import Line
from backbones.layers.norm import LayerNorm
from backbones.layers.scan import OnBackend, Scan
from backbones.layers.selective_ssm import SelectiveSSM
from backbones.layers.shapes import check_map, inner_width, input_width
from backbones.layers.tracing import Opaque
from backbones.ops import depthwise_conv, silu_gate
from backbones.ops.dispatch import has_kernel
from backbones.patterns import CROSS
from backbones.patterns.subset import Subset
from backbones.patterns.taps import window_outputs, window_taps

_CROSS = Scan(CROSS)


class DepthwiseConv2d(OnBackend, nn.Conv2d):
    """Depthwise convolution of a channels-last map (b, h, w, c), padded to keep its size at stride 1.

    Args:
        dim: width of the map.
        kernel_size: side of the window.
        stride: distance between windows.
        bias: whether there is a bias.
        silu: apply SiLU to the result.
        gelu: apply GELU instead.
        residual: add the map before that, at stride 1.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        stride: int = 1,
        bias: bool = True,
        silu: bool = False,
        gelu: bool = False,
        residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim, dim, kernel_size, stride, kernel_size // 2, groups=dim, bias=bias, device=device, dtype=dtype
        )
        self.silu, self.gelu, self.residual = silu, gelu, residual

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, c) to (b, ceil(h / stride), ceil(w / stride), c)."""
        check_map(x, self.in_channels)
        (height, width), size, stride = x.shape[1:3], self.kernel_size[0], self.stride[0]
        # PyTorch's own convolution is faster than the naive operator, and what compilers fuse and other runtimes know.
        traced = torch.compiler.is_compiling() or not isinstance(height, int)
        slow = self.backend is None and not has_kernel("depthwise_conv", x.device.type, x.dtype)
        if traced or slow or self.backend == "naive":
            y = super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            y = x + y if self.residual else y
            return F.silu(y) if self.silu else F.gelu(y) if self.gelu else y
        taps, inverse_taps = window_taps(height, width, size, stride, device=x.device)
        weight, bias = self.weight.view(1, -1, size * size), None if self.bias is None else self.bias.unsqueeze(0)
        y = depthwise_conv(
            x.flatten(1, 2), weight, bias, taps, inverse_taps,
            silu=self.silu, gelu=self.gelu, residual=self.residual, backend=self.backend,
        )  # fmt: skip
        sides = [window_outputs(side, size, stride) for side in (height, width)]
        return y.reshape(x.shape[0], *sides, self.in_channels)

    def along(self, x: Tensor, grid: tuple[int, int], subset: Subset | None = None) -> Tensor:
        """The convolution, at stride 1, of the map that the tokens x (b, l, c) are of, at those tokens.

        Of a ``subset`` of the grid's tokens, it reads zeros where one is missing.
        """
        if subset is None:
            return self(x.unflatten(1, grid)).flatten(1, 2)
        return subset.taken(self(subset.placed(x)))


def scan_grid(ssm: Callable[..., Tensor], x: Tensor, scan: Scan, out: str = "sum") -> Tensor:
    """Scans a map along the orders of ``scan.pattern``, and adds their outputs unless ``out`` is "per_order".

    Padded slots of an order read one zero token behind the map: it adds nothing to the state, but the state
    decays there. Where the orders share the cells among them, each projects only those that it visits, but on a GPU.

    Args:
        ssm: what scans, called as a :class:`SelectiveSSM`.
        x: the map that every order reads, (b, h, w, c), or one for each of k orders, (b, h, w, k, c).
        scan: the k orders, and the window.
        out: "sum" gives (b, h, w, c), "per_order" (b, h, w, k, c).
    """
    height, width = x.shape[1:3]
    cells, pattern = height * width, scan.pattern
    window = scan.window(cells)
    orders, visits, padded = pattern.tables(height, width, x.device)
    tokens = x.flatten(1, 2)
    if padded:
        tokens = F.pad(tokens, (0, 0) * (tokens.dim() - 2) + (0, 1))
    # A GPU gains nothing: what matters there is the number of launches, of which gathering makes more.
    gathers = not x.is_cuda and x.dim() == 4 and out == "sum" and pattern.num_orders > 1
    if gathers and pattern.shares_cells(height, width):
        visited = orders.t().flatten().long()  # step by step, order by order
        steps = tokens.index_select(1, visited).unflatten(1, (-1, pattern.num_orders))
        steps = ssm(steps, None, "per_step", window).flatten(1, 2)
        y = steps.new_empty(tokens.shape).index_copy_(1, visited, steps)
    else:
        y = ssm(tokens, orders, out, window, visits)
    return (y[:, :cells] if padded else y).unflatten(1, (height, width))


class SS2D(Opaque, nn.Module):
    """Linear, depthwise 3 x 3 convolution, SiLU, scan along each order, norm, optional gate, linear
    (VMamba, arXiv:2401.10166).

    The defaults are those of VMamba's first generation, with 16 states and a gate. The second has ``d_state=1,
    gated=False, conv_bias=False``, and ``ssm_ratio`` 1 or 2.

    Args:
        dim: width of the map.
        scan: orders to scan, each with its own state-space parameters; window and backend.
        d_state: states of each channel.
        ssm_ratio: inner width over ``dim``.
        dt_rank: rank of the step size's projection; None is ceil(dim / 16).
        gated: multiply by SiLU(z), z a second projection of the input.
        conv_bias: bias of the depthwise convolution.
        merge: constructor called as ``merge(d_inner, device=, dtype=)``, of what takes the outputs of k orders
            (b, l, k, d_inner) to one (b, l, d_inner); None is their sum.
        scanner: constructor called as ``scanner(d_inner, device=, dtype=)``, of what takes the convolved map
            (b, h, w, d_inner) to one of the same shape, such as :class:`backbones.layers.MultiHeadScan`; ``scan``,
            ``d_state``, ``dt_rank`` and ``merge`` are then its own matter. None is a selective scan.
        out_proj: project back to ``dim``; without it ``ssm_ratio`` has to be 1.

    Raises:
        ValueError: no ``out_proj`` and an inner width other than ``dim``, or both ``scanner`` and ``merge``; in
            ``forward``, another shape.
    """

    prunable: ClassVar[tuple[str, ...]] = ("out_proj",)

    def __init__(
        self,
        dim: int,
        scan: Scan = _CROSS,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | None = None,
        gated: bool = True,
        conv_bias: bool = True,
        merge: Constructor | None = None,
        scanner: Constructor | None = None,
        out_proj: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_inner = inner_width(dim, ssm_ratio, "ssm_ratio")
        if not out_proj and d_inner != dim:
            raise ValueError(f"out_proj: got False with ssm_ratio {ssm_ratio}, expected ssm_ratio 1")
        if scanner is not None and merge is not None:
            raise ValueError(f"merge: got {merge} beside a scanner, which merges its orders itself")
        self.dim, self.scan, self.gated = dim, scan, gated
        self.in_proj = nn.Linear(dim, 2 * d_inner if gated else d_inner, bias=False, device=device, dtype=dtype)
        self.conv2d = DepthwiseConv2d(d_inner, bias=conv_bias, silu=True, device=device, dtype=dtype)
        self.scanner = None if scanner is None else scanner(d_inner, device=device, dtype=dtype)
        self.ssm: SelectiveSSM | None = None
        if scanner is None:
            dt_rank = -(-dim // 16) if dt_rank is None else dt_rank
            self.ssm = SelectiveSSM(d_inner, d_state, dt_rank, scan.pattern.num_orders, scan.backend, device, dtype)
        self.merge = None if merge is None else merge(d_inner, device=device, dtype=dtype)
        self.out_norm = LayerNorm(d_inner, autocast_out=True, device=device, dtype=dtype)
        self.out_proj = nn.Linear(d_inner, dim, bias=False, device=device, dtype=dtype) if out_proj else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, h, w, dim)."""
        check_map(x, input_width(self.in_proj, self.dim))
        x, z = self.in_proj(x).chunk(2, dim=-1) if self.gated else (self.in_proj(x), None)
        y = self.out_norm(self._scanned(self.conv2d(x)))
        backend = self.conv2d.backend if self.ssm is None else self.ssm.backend
        return self.out_proj(y if z is None else silu_gate(y, z, backend=backend))

    def add_to(self, line: Line, x: Tensor) -> None:
        """The layer, of a map like ``x``, as steps of a block's line."""
        check_map(x, input_width(self.in_proj, self.dim))
        (height, width), pattern = x.shape[1:3], self.scan.pattern
        orders, visits, padded = pattern.tables(height, width, x.device)
        if self.merge is not None or padded:
            line.fails = True
            return
        line.linear(self.in_proj)
        if self.gated:
            line.split()
        conv = line.weights(self.conv2d, DepthwiseConv2d, "weight", "bias")
        taps, window = window_taps(height, width, 3, device=x.device), self.scan.window(height * width)
        line.scan(conv, taps, self.ssm, orders, window, visits)
        line.norm(self.out_norm, adds=False)
        if self.gated:
            line.gate()
        line.linear(self.out_proj)

    def _scanned(self, x: Tensor) -> Tensor:
        if self.scanner is not None:
            return self.scanner(x)
        assert self.ssm is not None
        y = scan_grid(self.ssm, x, self.scan, "sum" if self.merge is None else "per_order")
        return y if self.merge is None else self.merge(y.flatten(1, 2)).unflatten(1, y.shape[1:3])
