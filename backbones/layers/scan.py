"""How a mixer scans, as one value; and the switch that moves every operator of a model to a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from backbones.layers.tracing import Opaque
from backbones.patterns import ScanPattern, backwards, checked_pattern


@dataclass(frozen=True)
class Scan:
    """Orders, window and backend of a mixer's scans.

    Attributes:
        pattern: the orders.
        local_window: window in steps, see :func:`backbones.ops.selective_scan`; or a rule that gives it from the
            number of tokens.
        backend: see :func:`backbones.ops.selective_scan`.
    """

    pattern: ScanPattern
    local_window: int | Callable[[int], int] = 0
    backend: str | None = None

    @classmethod
    def pop(cls, options: dict[str, Any], default: ScanPattern) -> Scan:
        """Takes a model's arguments ``pattern``, ``local_window`` and ``scan_backend`` out of ``options``.

        Raises:
            ValueError: the pattern is unknown, or has another number of orders than ``default``.
        """
        pattern = checked_pattern(options.pop("pattern", default), default)
        return cls(pattern, options.pop("local_window", 0), options.pop("scan_backend", None))

    @classmethod
    def pop_each(cls, options: dict[str, Any], defaults: Sequence[ScanPattern]) -> list[Scan]:
        """As `pop`, for layers of different patterns; the model's argument ``pattern`` stands in for them all.

        Raises:
            ValueError: as `pop`.
        """
        given = "pattern" in options
        scan = cls.pop(options, defaults[0])
        return [scan if given else replace(scan, pattern=pattern) for pattern in defaults]

    def backwards(self) -> Scan:
        """This along the same orders, each from its last step to its first."""
        return replace(self, pattern=backwards(self.pattern))

    def of_one_order(self) -> Scan:
        """This, for mixers that scan once.

        Raises:
            ValueError: the pattern has several orders.
        """
        if self.pattern.num_orders != 1:
            raise ValueError(f"scan: got {self.pattern.name!r} with {self.pattern.num_orders} orders, expected one")
        return self

    def window(self, tokens: int) -> int:
        """The window for ``tokens`` tokens, in steps."""
        return self.local_window(tokens) if callable(self.local_window) else self.local_window


class OnBackend(Opaque):
    """A module that calls operators of :mod:`backbones.ops`, on the backend that it names."""

    backend: str | None = None


def set_backend(model: nn.Module, backend: str | None) -> None:
    """Runs every operator of ``model`` on one backend; None chooses by device, as models do from the start.

    "naive" is plain PyTorch throughout: any device and dtype, derivatives of any order.
    """
    for module in model.modules():
        if isinstance(module, OnBackend):
            module.backend = backend
