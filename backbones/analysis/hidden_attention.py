"""The attention that is hidden in a selective scan: how much each token reaches each other one.

A scan is linear in its input once dt, B and C are given, so it is a matrix for each channel (The Hidden Attention of
Mamba Models, arXiv:2403.01590, equation 6)::

    y_i = sum_j  C_i exp(A (dt_{j+1} + ... + dt_i)) dt_j B_j  u_j      for j not after i in the order
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers import SelectiveSSM
from backbones.ops.scan.projection import per_order_linear
from backbones.ops.tracing import TorchDispatchMode

_SCAN = torch.ops.backbones.selective_scan.default


@dataclass(frozen=True)
class RecordedScan:
    """One scan that a model made, with the tensors that it passed to the operator; shapes as there.

    Attributes:
        name: the layer's name in the model.
        grid: height and width of the map that was scanned.
        class_token: whether a class token stands in the middle of its tokens.
        u, delta, A, B, C, orders, delta_bias, delta_softplus, local_window: see
            :func:`backbones.ops.selective_scan`.
    """

    name: str
    grid: tuple[int, int]
    class_token: bool
    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    orders: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    local_window: int

    def token(self, row: int, column: int) -> int:
        """The token at a cell of the grid."""
        height, width = self.grid
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"cell: got ({row}, {column}), expected one of a {height} x {width} grid")
        cell = row * width + column
        return cell + int(self.class_token and cell >= height * width // 2)

    def to_map(self, x: Tensor) -> Tensor:
        """Values of tokens (..., l) as a map (..., height, width), without class token and padding."""
        height, width = self.grid
        cells = height * width
        if self.class_token:
            x = torch.cat([x[..., : cells // 2], x[..., cells // 2 + 1 :]], -1)
        return x[..., :cells].unflatten(-1, (height, width))


@contextmanager
def recorded_scans(model: nn.Module) -> Iterator[list[RecordedScan]]:
    """Every scan that ``model`` makes meanwhile, in turn; compiled models record nothing."""
    scans: list[RecordedScan] = []
    place: dict[str, Any] = {}

    def enter_mixer(module: nn.Module, args: tuple[Any, ...]) -> None:
        place["plain"] = len(args) == 2  # tokens and their grid, else a map
        place["grid"] = tuple(args[1]) if place["plain"] else tuple(args[0].shape[1:3])
        place["mixer"] = module

    def enter_scan(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            place["name"] = name

        return hook

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is _SCAN:
                scans.append(_scan(place, args))
            return func(*args, **(kwargs or {}))

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, SelectiveSSM):
            handles.append(module.register_forward_pre_hook(enter_scan(name)))
            handles.append(model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(enter_mixer))
    try:
        with Recorder():
            yield scans
    finally:
        for handle in handles:
            handle.remove()


def _scan(place: dict[str, Any], args: Sequence[Any]) -> RecordedScan:
    u, delta, A, B, C, _, orders, delta_bias, dt_weight, delta_softplus, _, local_window, *_ = args
    delta = delta if dt_weight is None else per_order_linear(delta, dt_weight)
    height, width = place["grid"]
    if orders is None and u.dim() == 4:  # the steps of each order, see `scan_grid`
        orders = place["mixer"].scan.pattern.orders(height, width, u.device, pad_index=height * width)
        u, delta, B, C = (_by_token(x, orders) for x in (u, delta, B, C))
    tensors = [None if x is None else x.detach().clone() for x in (u, delta, A, B, C, orders, delta_bias)]
    if hasattr(place["mixer"], "scanned_grid"):
        height, width = place["mixer"].scanned_grid(place["name"].rpartition(".")[2], height, width)
    class_token = place["plain"] and delta.shape[1] == height * width + 1
    return RecordedScan(place["name"], (height, width), class_token, *tensors, delta_softplus, local_window)  # type: ignore


def _by_token(x: Tensor, orders: Tensor) -> Tensor:
    """Steps (b, t, k, c) at their tokens (b, l, k, c), 0 where an order does not go."""
    tokens = x.new_zeros(len(x), int(orders.max()) + 1, *x.shape[2:])
    return tokens.scatter_(1, orders.t().long()[None, :, :, None].expand_as(x), x.detach())


def hidden_attention(scan: RecordedScan, tokens: Sequence[int], image: int = 0) -> Tensor:
    """What reaches some tokens from all: weights (k, q, l, c) with ``y[i] = sum_kj weights[k, i, j] * u[j, k]``.

    All visits of a token count; D u is left out. The cost is linear in the number of asked tokens and in l.

    Args:
        scan: of :func:`recorded_scans`.
        tokens: q tokens whose outputs are asked for.
        image: which of the batch.

    Returns:
        float64, for each order k, asked token, token l that it hears of, and channel.
    """
    delta, B, C = (x[image].double() for x in (scan.delta, scan.B, scan.C))
    length, orders_count, channels = delta.shape
    if scan.delta_bias is not None:
        delta = delta + scan.delta_bias
    dt = F.softplus(delta) if scan.delta_softplus else delta
    orders = torch.arange(length).expand(orders_count, -1) if scan.orders is None else scan.orders.long()
    weights = dt.new_zeros(orders_count, len(tokens), length, channels)
    for k, order in enumerate(orders):
        A = scan.A[k].double()
        elapsed = dt[order, k].cumsum(0)
        for q, token in enumerate(tokens):
            for t in (order == token).nonzero().flatten().tolist():
                heard = order[: t + 1]
                time = elapsed[t] - elapsed[: t + 1]  # from each input to the output
                if scan.local_window > 1:
                    # Later inputs of the window decay back to step t, through its own dt but not through theirs.
                    end = min((t // scan.local_window + 1) * scan.local_window, len(order))
                    heard = order[:end]
                    time = torch.cat([time, elapsed[t : end - 1] - elapsed[t] + dt[token, k]])
                decays = torch.exp(time.unsqueeze(-1) * A)
                reach = torch.einsum("tcn,n,tn->tc", decays, C[token, k], B[heard, k]) * dt[heard, k]
                weights[k, q].index_add_(0, heard, reach)
    return weights
