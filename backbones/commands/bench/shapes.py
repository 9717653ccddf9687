"""The scans of real models, and the loop that papers and public references write for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """A call of the operator as a model makes it."""

    where: str
    b: int
    k: int
    c: int
    length: int
    n: int
    shared_u: bool = True

    def tensors(self, dtype: torch.dtype) -> dict[str, Any]:
        """Inputs in the value ranges of a trained model."""
        b, length, k, c, n = self.b, self.length, self.k, self.c, self.n
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        steps = torch.arange(length)
        return {
            "u": normal(*((b, length, c) if self.shared_u else (b, length, k, c))).to(dtype),
            "delta": normal(b, length, k, c).to(dtype),
            "A": -torch.arange(1.0, n + 1).expand(k, c, n).contiguous(),
            "B": normal(b, length, k, n).to(dtype),
            "C": normal(b, length, k, n).to(dtype),
            "D": normal(k, c),
            "delta_bias": normal(k, c) * 0.7 - 4.5,
            "orders": torch.stack([steps if i % 2 == 0 else steps.flip(0) for i in range(k)]).int(),
        }

    def leaves(self, dtype: torch.dtype) -> dict[str, Any]:
        """The same, with gradients wanted."""
        return {name: x.requires_grad_() if x.is_floating_point() else x for name, x in self.tensors(dtype).items()}

    def floor(self, element_size: int, bytes_per_second: float, exps_per_second: float) -> float:
        """Seconds below which no forward can go: its tensors pass through memory once, its exponentials are computed.

        One for each decay, and for each softplus 2.2, since its logarithm costs about as much as 1.2.
        """
        b, length, k, c, n = self.b, self.length, self.k, self.c, self.n
        elements = b * length * (c * (1 if self.shared_u else k) + k * c + 2 * k * n + c)
        exps = b * length * k * c * (n + 2.2)
        return max(elements * element_size / bytes_per_second, exps / exps_per_second)


SHAPES = {
    "a": Shape("Vim-Ti, 224 px", 8, 2, 384, 197, 16, shared_u=False),
    "b1": Shape("VMamba-T stage 1, ssm_ratio 2", 8, 4, 192, 3136, 1),
    "b1s": Shape("VMamba-T stage 1", 8, 4, 96, 3136, 1),
    "b16": Shape("VMamba-T stage 1, 16 states", 2, 4, 192, 3136, 16),
    "c2": Shape("VMamba-T stage 2, ssm_ratio 2", 8, 4, 384, 784, 1),
    "c3": Shape("VMamba-T stage 3, ssm_ratio 2", 8, 4, 768, 196, 1),
    "c4": Shape("VMamba-T stage 4, ssm_ratio 2", 8, 4, 1536, 49, 1),
    "d": Shape("Vim-Ti, 1248 px", 1, 2, 384, 6084, 16, shared_u=False),
}


class TextbookLoop:
    """The recurrence as papers and public references write it: channels-first, one step after the other.

    B and C are repeated for every channel, as there. The inputs are in visiting order already: the copies that this
    takes are not counted.
    """

    def __init__(self, t: dict[str, Tensor]) -> None:
        orders = t["orders"].long()
        b, length, k, c = t["delta"].shape
        u = t["u"] if t["u"].dim() == 4 else t["u"].unsqueeze(2).expand(b, length, k, c)

        def visited(x: Tensor) -> Tensor:
            return torch.stack([x[:, order, i] for i, order in enumerate(orders)], 1).transpose(2, 3).contiguous()

        self.u, self.delta, self.B, self.C = (visited(x) for x in (u, t["delta"], t["B"], t["C"]))  # (b, k, c or n, t)
        self.A, self.D, self.bias = t["A"], t["D"], t["delta_bias"]

    def __call__(self) -> Tensor:
        """(b, k, c, t)."""
        c = self.u.shape[2]
        B, C = (x.unsqueeze(2).expand(-1, -1, c, -1, -1).contiguous() for x in (self.B, self.C))  # (b, k, c, n, t)
        dt = F.softplus(self.delta + self.bias.unsqueeze(-1))
        decay = torch.exp(torch.einsum("bkct,kcn->bkctn", dt, self.A))
        inputs = torch.einsum("bkct,bkcnt,bkct->bkctn", dt, B, self.u)
        h = torch.zeros_like(inputs[..., 0, :])
        y = []
        for i in range(dt.shape[-1]):
            h = decay[..., i, :] * h + inputs[..., i, :]
            y.append(torch.einsum("bkcn,bkcn->bkc", h, C[..., i]))
        return torch.stack(y, -1) + self.D.unsqueeze(-1) * self.u
