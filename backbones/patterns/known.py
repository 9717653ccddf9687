"""The one cache of tables and facts about grids and patterns; each is computed once.

Tables are made on the CPU, where nothing waits for a device, and moved. The cache is bounded by bytes, not by number,
so that a model whose layers each have a pattern of their own keeps all of them: the fifteen patterns of localvim_tiny
take 0.5 MB on 14 x 14 patches and 10 MB on the 50 x 84 patches of a detector.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import wraps
from threading import Lock
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from backbones.ops.tracing import is_traced, untraced

MAX_BYTES = 256 * 2**20
_ENTRY = 512  # bytes of the books themselves
_CPU = torch.device("cpu")
Function = TypeVar("Function", bound=Callable[..., Any])


class Cache:
    """Values by key, of at most ``max_bytes``: those not asked for longest go first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of ``key``, which ``make`` makes where there is none."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
        value = make()
        tables = value if isinstance(value, tuple) else (value,)
        size = _ENTRY + sum(x.nbytes for x in tables if isinstance(x, Tensor))
        with self._lock:
            if key in self._values:  # another thread made it meanwhile
                return self._values[key][0]
            self._values[key] = value, size
            self.bytes += size
            while self.bytes > self.max_bytes and len(self._values) > 1:
                self.bytes -= self._values.popitem(last=False)[1][1]
        return value

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._values.clear()
            self.bytes = 0


CACHE = Cache(MAX_BYTES)


def known_tables(make: Function) -> Function:
    """Decorates ``make(*key, device=...)``, which gives a table or a tuple of them: made once for each key and device.

    Where a tracer or function transform would own the tables they are made anew. Else they are shared: never modify
    them in place.
    """

    @wraps(make)
    def tables(*key: Any, device: torch.device | str | None = None) -> Any:
        device = _resolved(device)
        return make(*key, device=device) if is_traced() else cached(*key, device=device)

    def cached(*key: Any, device: torch.device) -> Any:
        def on_device() -> Any:
            # Tensors made under inference_mode could not be saved for the backward pass of a later training step.
            with torch.inference_mode(False):
                made = make(*key, device=_CPU)
                return tuple(x.to(device) for x in made) if isinstance(made, tuple) else made.to(device)

        return CACHE.get((make, device, *key), on_device)

    tables.cached = cached  # type: ignore[attr-defined]  # whoever traces
    return cast(Function, tables)


def known_fact(find: Function) -> Function:
    """Decorates ``find(*key)``, which gives numbers and may look at tables: found once for each key, whoever traces."""

    @wraps(find)
    def fact(*key: Any) -> Any:
        def found() -> Any:
            with untraced(), torch.inference_mode(False):
                return find(*key)

        return CACHE.get((find, *key), found)

    return cast(Function, fact)


def _resolved(device: torch.device | str | None) -> torch.device:
    device = _CPU if device is None else torch.device(device)
    if device.index is None and device.type not in ("cpu", "meta"):
        return torch.empty(0, device=device).device  # the current one
    return device
