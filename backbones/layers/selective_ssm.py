"""The selective state-space layer: input-dependent step sizes, input and output weights around one scan."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers.scan import OnBackend
from backbones.ops import Visits, selective_scan
from backbones.ops.dispatch import choose
from backbones.ops.scan.decay import decay_rates
from backbones.ops.scan.projected import has_projected_scan, projected_scan
from backbones.ops.scan.projection import joint_linear, per_order_linear

Operands = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None]

# Widest rank at which the `cpu` kernel projects step sizes itself while training. Measured on one core, as the layer's
# time over that with a matrix product in front: inference takes 0.58 (rank 6, one state) to 0.95 (rank 48, 16 states),
# as nothing of size (b, l, k, c) is stored, so it always does. Training projects twice, which takes 0.63 of the time
# at rank 6, 0.9 at 12 and 0.98 at 24, but 1.1 at 48.
_MAX_FUSED_RANK_IN_TRAINING = 24


class SelectiveSSM(OnBackend, nn.Module):
    """S6 (Mamba, algorithm 2) for k orders at once, in token order and channels-last.

    ``x_proj`` and ``dt_proj`` act on single tokens, so they commute with any traversal: every token is
    projected once for each order, and the scan reads it when its turn comes.

    Args:
        d_inner: channels c of each order.
        d_state: states n of each channel.
        dt_rank: rank r of the step size's projection; None is ceil(d_inner / 32), right where d_inner is
            twice the width.
        num_orders: k, orders with parameters of their own.
        backend: see :func:`backbones.ops.selective_scan`.
    """

    no_decay: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_proj_bias")
    autocast_weights: ClassVar[tuple[str, ...]] = ("x_proj_weight", "dt_proj_weight")
    # As `projected_scan` takes them.
    scanned: ClassVar[tuple[str, ...]] = (*autocast_weights, "dt_proj_bias", "A_log", "D")

    def __init__(
        self,
        d_inner: int,
        d_state: int = 16,
        dt_rank: int | None = None,
        num_orders: int = 1,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dt_rank = math.ceil(d_inner / 32) if dt_rank is None else dt_rank
        self.d_inner, self.d_state, self.dt_rank, self.num_orders = d_inner, d_state, dt_rank, num_orders
        self.backend = backend

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_orders, *shape, device=device, dtype=dtype))

        self.x_proj_weight = parameter(dt_rank + 2 * d_state, d_inner)
        self.dt_proj_weight = parameter(d_inner, dt_rank)
        self.dt_proj_bias = parameter(d_inner)
        self.A_log = parameter(d_inner, d_state)
        self.D = parameter(d_inner)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, dt_min: float = 1e-3, dt_max: float = 0.1, dt_floor: float = 1e-4) -> None:
        """Mamba's initialisation: A = -1..-n, D = 1, step sizes log-uniform in [dt_min, dt_max]."""
        self.x_proj_weight.uniform_(-(self.d_inner**-0.5), self.d_inner**-0.5)
        self.dt_proj_weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = torch.rand_like(self.dt_proj_bias) * math.log(dt_max / dt_min) + math.log(dt_min)
        dt = dt.exp().clamp(min=dt_floor)
        self.dt_proj_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        self.A_log.copy_(torch.arange(1, self.d_state + 1, device=self.A_log.device).log().expand_as(self.A_log))
        self.D.fill_(1)

    @property
    def A(self) -> Tensor:
        """Decay rates (k, c, n), in float32 at least: half precision would change how long a state remembers."""
        return decay_rates(self.A_log, self.backend)

    def project(self, u: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """delta, dt_weight, B and C for :func:`backbones.ops.selective_scan`, of u (b, l, c) or (b, l, k, c).

        delta is (b, l, k, dt_rank) where the scan had better project it by dt_weight itself; else it is
        (b, l, k, c), and dt_weight is None.
        """
        if u.dim() == 3:
            x = F.linear(u, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (self.num_orders, -1))
        else:
            x = per_order_linear(u, self.x_proj_weight)
        dt, B, C = x.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if self._scan_projects(u):
            return dt, self.dt_proj_weight, B, C
        if u.is_cuda and u.dim() == 3:
            return joint_linear(x, self.dt_proj_weight), None, B, C
        return per_order_linear(dt, self.dt_proj_weight), None, B, C

    def _scan_projects(self, u: Tensor) -> bool:
        # `torch.jit.trace` runs once with gradients and once without, and expects the same program.
        training = torch.is_grad_enabled() or torch.jit.is_tracing()  # type: ignore[attr-defined]
        fused = not training or self.dt_rank <= _MAX_FUSED_RANK_IN_TRAINING
        # A meta tensor is only counted, and a product counts as one where it is visible.
        return fused and u.device.type == "cpu" and choose("selective_scan", self.backend, "cpu", u.dtype) == "cpu"

    def operands(self, u: Tensor) -> Operands:
        """The scan's operands: u, its projections by `project`, and D."""
        return u, *self.project(u), self.D

    def forward(
        self,
        u: Tensor,
        orders: Tensor | None = None,
        out: str = "sum",
        local_window: int = 0,
        visits: Visits | None = None,
    ) -> Tensor:
        """Scans u (b, l, c), or (b, l, k, c) where orders read different inputs; see ``selective_scan``."""
        if self.is_one_operation(u, orders, visits):
            return self.projected(u, orders, out, visits, local_window)
        return self._scan_of(self.operands(u), orders, out, local_window, visits)

    def _scan_of(
        self, operands: Operands, orders: Tensor | None, out: str, local_window: int, visits: Visits | None
    ) -> Tensor:  # fmt: skip
        u, delta, dt_weight, B, C, D = operands
        return selective_scan(
            u,
            delta,
            self.A,
            B,
            C,
            D,
            orders=orders,
            delta_bias=self.dt_proj_bias,
            dt_weight=dt_weight,
            out=out,
            local_window=local_window,
            visits=visits,
            backend=self.backend,
        )

    def is_one_operation(self, u: Tensor, orders: Tensor | None = None, visits: Visits | None = None) -> bool:
        """Whether projections and scan are `projected`: see `backbones.ops.scan.projected`."""
        if type(self) is not SelectiveSSM:  # others project in another way
            return False
        return has_projected_scan(u, *self._weights(), orders=orders, visits=visits, backend=self.backend)

    def projected(
        self, u: Tensor, orders: Tensor | None, out: str, visits: Visits | None, local_window: int = 0,
        into: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """`forward` where `is_one_operation`; "per_step" without a window is written ``into`` (b, t, k, d_inner)."""
        return projected_scan(
            u, *self._weights(), orders=orders, out=out, local_window=local_window, visits=visits, into=into
        )

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.x_proj_weight, self.dt_proj_weight, self.dt_proj_bias, self.A_log, self.D

    def per_order_over_gaps(self, u: Tensor, gaps: Tensor, orders: Tensor, visits: Visits | None = None) -> Tensor:
        """Scans u (b, l, k, c) as if tokens had been taken out of the sequence: (b, l, k, c), each order for itself.

        A token that is missing counts as one without features, whose step size is softplus of the bias alone: the
        state decays, h = exp(A (dt + g softplus(bias))) h + dt B u, where g of them went before this one.

        Args:
            u: input of each order.
            gaps: (b, l, k), the tokens missing in front of each token on an order's way.
            orders: see :func:`backbones.ops.selective_scan`.
            visits: see there.
        """
        u, delta, dt_weight, B, C, D = self.operands(u)
        if dt_weight is not None:
            delta = per_order_linear(delta, dt_weight)
        A = self.A
        bias = self.dt_proj_bias.to(A.dtype)
        dt = F.softplus(delta.to(bias.dtype) + bias)
        total = dt + gaps.unsqueeze(-1) * F.softplus(bias)
        # The operator has one step size for the decay and for the input: the input is scaled down to its own.
        share = dt / total.clamp_min(torch.finfo(total.dtype).tiny)
        y = selective_scan(
            u * share.to(u.dtype), total.to(u.dtype), A, B, C, orders=orders, delta_softplus=False,
            out="per_order", visits=visits, backend=self.backend,
        )  # fmt: skip
        return y if D is None else y + D.to(u.dtype) * u
