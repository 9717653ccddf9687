"""Inputs of the selective scan for tests, in every mode that it has."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call of the operator; ``steps`` None is the identity order, ``rank`` 0 no projection of step sizes."""

    b: int = 2
    length: int = 13
    k: int = 2
    c: int = 5
    n: int = 4
    rank: int = 0
    steps: int | None = None
    shared_u: bool = False
    out: str = "sum"
    window: int = 0
    bias: bool = True
    skip: bool = True
    softplus: bool = True

    def tensors(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor | None]:
        """Arguments of ``selective_scan`` as leaves that require gradients."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        b, length, k, c, n = self.b, self.length, self.k, self.c, self.n
        delta = normal(b, length, k, self.rank or c)
        tensors = {
            "u": normal(b, length, c) if self.shared_u else normal(b, length, k, c),
            "delta": delta if self.softplus else delta.abs() * 0.3,
            "A": -torch.exp(normal(k, c, n)),
            "B": normal(b, length, k, n),
            "C": normal(b, length, k, n),
            "D": normal(k, c) if self.skip else None,
            "dt_weight": normal(k, c, self.rank) * self.rank**-0.5 if self.rank else None,
            "delta_bias": (normal(k, c) if self.softplus else normal(k, c).abs() * 0.1) if self.bias else None,
        }
        narrow = {"u", "delta", "B", "C"}
        for name, x in tensors.items():
            if x is not None:
                # What a low precision cannot hold is no error of the scan: round before the reference sees
                # it.
                x = x.to(dtype) if name in narrow else x.to(torch.float64 if dtype == torch.float64 else torch.float32)
                tensors[name] = x.requires_grad_()
        tensors["orders"] = None
        if self.steps is not None:
            tensors["orders"] = torch.randint(0, length, (k, self.steps), generator=generator)
        return tensors

    def options(self) -> dict:
        """Keyword arguments of ``selective_scan`` that are no tensors."""
        return {"out": self.out, "local_window": self.window, "delta_softplus": self.softplus}


PLAIN = Case()
CASES = {
    "plain": PLAIN,
    "shared u": replace(PLAIN, shared_u=True),
    "per order": replace(PLAIN, out="per_order"),
    "per step": replace(PLAIN, out="per_step"),
    "no D": replace(PLAIN, skip=False),
    "no bias": replace(PLAIN, bias=False),
    "no softplus": replace(PLAIN, softplus=False),
    "one step": replace(PLAIN, length=1),
    "one of everything": Case(b=1, length=1, k=1, c=1, n=1),
    "one state": replace(PLAIN, n=1, shared_u=True, k=4, c=19, length=70),
    "sixteen states": replace(PLAIN, n=16, c=37, length=70),
    "three states, wide": replace(PLAIN, n=3, c=130, length=9),
    "repeats and skips": replace(PLAIN, steps=21),
    "repeats, shared u, per order": replace(PLAIN, steps=21, shared_u=True, out="per_order"),
    "repeats, per step, one state": replace(PLAIN, steps=17, n=1, out="per_step", c=33),
    "few steps": replace(PLAIN, steps=3),
    "long": Case(b=1, length=200, k=1, c=17, n=16),
    "long, one state": Case(b=1, length=200, k=3, c=17, n=1, shared_u=True),
    "window": replace(PLAIN, window=4),
    "window, repeats": replace(PLAIN, window=3, steps=20, shared_u=True),
    "window, sixteen states": Case(b=2, length=133, k=1, c=21, n=16, window=8),
    "window, one state": Case(b=2, length=150, k=4, c=21, n=1, window=16, shared_u=True),
    "window longer than the sequence": replace(PLAIN, window=99, out="per_order"),
    "window of one": replace(PLAIN, window=1),
    "projected": replace(PLAIN, rank=3),
    "projected, one state": Case(b=2, length=70, k=4, c=37, n=1, rank=6, shared_u=True),
    "projected, sixteen states": replace(PLAIN, rank=5, n=16, c=70, length=66),
    "projected, repeats and skips": replace(PLAIN, rank=1, n=1, steps=21, skip=False, bias=False, c=83),
    "projected, window": Case(b=1, length=131, k=1, c=40, n=1, rank=9, window=16, out="per_step"),
}
