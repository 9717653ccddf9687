"""Scan patterns against recorded traversals, and the properties every traversal has to have."""

from __future__ import annotations

import copy
import gzip
import itertools
import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from backbones import scan_patterns
from backbones.patterns import (
    ATROUS,
    BIDIRECTIONAL,
    CROSS,
    DIAGONAL,
    FORWARD,
    HILBERT,
    MULTI_SCALE,
    PATTERNS,
    REVERSE,
    SNAKE,
    SPIRAL,
    SPIRAL_CORNERS,
    ScanPattern,
    both_ways,
    column_major,
    concatenated,
    directions,
    get_pattern,
    hilbert,
    known,
    local_windows,
    mirrored,
    raster,
    reversed_order,
    snake,
    spiral,
    stacked,
    transposed,
    turned,
)
from backbones.patterns.tokens import token_tables

# Recorded from the public implementations: "source/traversal/HxW" -> cells in turn, -1 for a padded slot.
RECORDED: dict[str, list[int]] = json.loads(
    gzip.decompress((Path(__file__).parent / "data" / "scan_orders.json.gz").read_bytes())
)
SIZES = [(1, 1), (1, 7), (6, 1), (2, 2), (2, 5), (4, 6), (5, 5), (7, 4), (9, 8), (13, 6)]
PERMUTATIONS = [FORWARD, REVERSE, BIDIRECTIONAL, CROSS, SNAKE, DIAGONAL, SPIRAL, SPIRAL_CORNERS, HILBERT]
# What the seven families use; these must serve dynamic shapes.
FAMILY_PATTERNS = [FORWARD, REVERSE, BIDIRECTIONAL, CROSS, ATROUS, MULTI_SCALE]


def single(order: scan_patterns.OrderFn) -> tuple[ScanPattern, int]:
    return ScanPattern("single", 1, stacked(order)), 0


def rotated(order: scan_patterns.OrderFn, quarters: int) -> scan_patterns.OrderFn:
    return lambda grid: order(grid.rot90(quarters))


upside_down_spiral = turned(mirrored(spiral))
COUNTERPARTS = {
    **{f"plainmamba/{k}": (SNAKE, k) for k in range(4)},
    **{f"efficientvmamba/{k}": (ATROUS, k) for k in range(4)},
    **{f"groupmamba/{k}": (CROSS, k) for k in range(4)},
    "localmamba/h": (FORWARD, 0),
    "localmamba/h_flip": (REVERSE, 0),
    "localmamba/v": (CROSS, 1),
    "localmamba/v_flip": (CROSS, 3),
    "localmamba/w2": (get_pattern("local_windows_2"), 0),
    "localmamba/w2_column_first": (get_pattern("local_windows_2"), 1),
    "localmamba/w2_flip": (get_pattern("local_windows_2"), 2),
    "localmamba/w3_column_first": (local_windows(3), 1),
    "localmamba/w7": (get_pattern("local_windows_7"), 0),
    "localmamba/w7_flip": (get_pattern("local_windows_7"), 2),
    "mhsvm/C0": (SNAKE, 0),
    "mhsvm/C1": (SNAKE, 2),
    "mhsvm/S0": (SPIRAL, 0),
    "mhsvm/S1": single(upside_down_spiral),
    "mhsvm/X0": (DIAGONAL, 0),
    "mhsvm/X1": (DIAGONAL, 1),
    "mhsvm/Z0": (BIDIRECTIONAL, 0),
    "mhsvm/Z1": single(transposed(raster)),
    "gilbert": (HILBERT, 0),
    "zigma/zigzag0": (SNAKE, 0),
    "zigma/zigzag1": (SNAKE, 2),
    "zigma/zigzag2": single(mirrored(snake)),
    "zigma/zigzag3": single(mirrored(transposed(snake))),
    "zigma/zigzag4": single(turned(mirrored(snake))),
    "zigma/zigzag5": single(turned(mirrored(transposed(snake)))),
    "zigma/zigzag6": single(turned(snake)),
    "zigma/zigzag7": single(turned(transposed(snake))),
    "zigma/hilbert0": single(transposed(hilbert)),
    "zigma/hilbert1": (HILBERT, 0),
    "zigma/hilbert2": single(rotated(transposed(hilbert), 3)),
    "zigma/hilbert3": single(rotated(hilbert, 1)),
    "zigma/hilbert4": single(rotated(transposed(hilbert), 2)),
    "zigma/hilbert5": (HILBERT, 1),
    "zigma/hilbert6": single(rotated(transposed(hilbert), 1)),
    "zigma/hilbert7": single(rotated(hilbert, 3)),
}


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    known.CACHE.clear()
    yield
    known.CACHE.clear()


def step_lengths(order: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """City-block and chessboard length of each step."""
    down, across = (order // width).diff().abs(), (order % width).diff().abs()
    return down + across, torch.maximum(down, across)


def pattern_id(value: object) -> str | None:
    return value.name if isinstance(value, ScanPattern) else None


@pytest.mark.parametrize("traversal", COUNTERPARTS)
def test_recorded_traversals(traversal: str) -> None:
    pattern, k = COUNTERPARTS[traversal]
    sizes = [key.rpartition("/")[2] for key in RECORDED if key.rpartition("/")[0] == traversal]
    assert sizes
    for size in sizes:
        height, width = map(int, size.split("x"))
        assert pattern.orders(height, width)[k].tolist() == RECORDED[f"{traversal}/{size}"], size


def test_every_recorded_traversal_has_a_counterpart() -> None:
    assert {key.rpartition("/")[0] for key in RECORDED} == set(COUNTERPARTS)


def test_orders_on_a_grid_small_enough_to_read() -> None:
    assert CROSS.orders(2, 3).tolist() == [
        [0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0],
    ]  # fmt: skip
    assert MULTI_SCALE.orders(2, 3).tolist() == [[5, 4, 3, 2, 1, 0, 0, 3, 1, 4, 2, 5, 5, 2, 4, 1, 3, 0]]
    assert ATROUS.orders(3, 3).tolist() == [[0, 2, 6, 8], [3, -1, 5, -1], [1, -1, 7, -1], [4, -1, -1, -1]]
    assert SPIRAL.orders(3, 3)[1].tolist() == [0, 3, 6, 7, 8, 5, 2, 1, 4]


@pytest.mark.parametrize("pattern", PERMUTATIONS, ids=pattern_id)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_order_is_a_permutation(pattern: ScanPattern, size: tuple[int, int]) -> None:
    orders = pattern.orders(*size)
    cells = size[0] * size[1]
    assert orders.shape == (pattern.num_orders, cells)
    assert orders.dtype == torch.int32
    assert torch.equal(orders.sort(dim=1).values, torch.arange(cells, dtype=torch.int32).expand_as(orders))
    assert not pattern.padded(*size)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_atrous_orders_divide_the_grid_among_them(size: tuple[int, int]) -> None:
    orders = ATROUS.orders(*size)
    visited = orders[orders >= 0]
    assert sorted(visited.tolist()) == list(range(size[0] * size[1]))
    assert orders.shape == (4, -(-size[0] // 2) * -(-size[1] // 2))


@pytest.mark.parametrize("window", [1, 2, 3, 7])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_local_windows_visit_every_cell_once(window: int, size: tuple[int, int]) -> None:
    orders = local_windows(window).orders(*size)
    assert orders.shape == (4, -(-size[0] // window) * -(-size[1] // window) * window**2)
    for order in orders:
        assert sorted(order[order >= 0].tolist()) == list(range(size[0] * size[1]))


@pytest.mark.parametrize("pattern", [SNAKE, SPIRAL], ids=pattern_id)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_unit_steps(pattern: ScanPattern, size: tuple[int, int]) -> None:
    for order in pattern.orders(*size):
        assert (step_lengths(order, size[1])[0] == 1).all()


@pytest.mark.parametrize("height", range(1, 17))
def test_hilbert_steps(height: int) -> None:
    for width in range(1, 17):
        longer, shorter = max(height, width), min(height, width)
        diagonal_steps = int(longer % 2 == 1 and shorter % 2 == 0 and shorter > 2)
        for order in HILBERT.orders(height, width):
            assert sorted(order.tolist()) == list(range(height * width))
            city_block, chessboard = step_lengths(order, width)
            assert int((city_block != 1).sum()) == diagonal_steps, (height, width)
            assert (chessboard == 1).all()


def test_hilbert_keeps_neighbours_together() -> None:
    # 16 steps of a raster span 16 columns; those of a Hilbert curve on a 2^n square fill one 4 x 4 block.
    blocks = HILBERT.orders(16, 16)[0].unflatten(0, (16, 16))
    rows, columns = blocks // 16, blocks % 16
    assert (rows.amax(1) - rows.amin(1) == 3).all()
    assert (columns.amax(1) - columns.amin(1) == 3).all()


@pytest.mark.parametrize("pattern", [p for p in PATTERNS.values() if p.num_orders == 4], ids=pattern_id)
def test_four_orders_differ(pattern: ScanPattern) -> None:
    for size in [(4, 6), (6, 4), (8, 8), (5, 7)]:
        assert len({tuple(order.tolist()) for order in pattern.orders(*size)}) == 4, size


def test_combinators() -> None:
    grid = torch.arange(6).view(2, 3)
    assert column_major(grid).tolist() == transposed(raster)(grid).tolist() == [0, 3, 1, 4, 2, 5]
    assert reversed_order(raster)(grid).tolist() == turned(raster)(grid).tolist() == [5, 4, 3, 2, 1, 0]
    assert mirrored(raster)(grid).tolist() == [2, 1, 0, 5, 4, 3]
    assert concatenated(raster, mirrored(raster))(grid).tolist() == [0, 1, 2, 3, 4, 5, 2, 1, 0, 5, 4, 3]
    assert both_ways(raster, column_major)(grid).tolist() == CROSS.orders(2, 3).tolist()


@pytest.mark.parametrize(
    "pattern, size, padded",
    [
        (ATROUS, (4, 6), False),
        (ATROUS, (5, 6), True),
        (ATROUS, (4, 7), True),
        (local_windows(3), (6, 9), False),
        (local_windows(3), (6, 8), True),
        (CROSS, (5, 7), False),
    ],
    ids=pattern_id,
)
def test_padded_slots(pattern: ScanPattern, size: tuple[int, int], padded: bool) -> None:
    orders = pattern.orders(*size)
    assert pattern.padded(*size) is padded
    assert bool((orders < 0).any()) is padded
    filled = pattern.orders(*size, pad_index=size[0] * size[1])
    assert torch.equal(filled, orders.where(orders >= 0, size[0] * size[1]))
    assert filled.dtype == torch.int32


def test_tables_are_cached_and_bounded() -> None:
    first = CROSS.orders(5, 7)
    assert CROSS.orders(5, 7) is first
    assert CROSS.orders(5, 7, torch.device("cpu")) is first
    assert copy.deepcopy(nn.ModuleList([Gather(CROSS)]))[0].pattern.orders(5, 7) is first
    assert CROSS.orders(7, 5) is not first
    assert ATROUS.orders(5, 7, pad_index=35) is ATROUS.orders(5, 7, pad_index=35)
    assert ATROUS.orders(4, 6, pad_index=24) is ATROUS.orders(4, 6)


def test_the_cache_is_bounded_by_bytes() -> None:
    cache, made = known.Cache(3000), []

    def table(key: str) -> Tensor:
        def make() -> Tensor:
            made.append(key)
            return torch.zeros(200)  # 800 bytes, and 512 for the books

        return cache.get(key, make)

    first = table("a")
    table("b")
    assert table("a") is first
    table("c")  # "b" goes, not asked for since
    assert len(cache) == 2
    assert table("a") is first
    table("b")
    assert made == ["a", "b", "c", "b"]
    cache.get("large", lambda: torch.zeros(10**6))
    assert len(cache) == 1
    cache.clear()
    assert len(cache) == cache.bytes == 0


def test_a_pattern_for_each_of_many_layers_stays_known() -> None:
    names = ("h", "h_flip", "v", "v_flip", "w2", "w2_flip", "w7", "w7_flip")
    patterns = [directions(*four) for four in itertools.permutations(names, 4)][:200]
    first = [token_tables(pattern, 7, 7, 50, 4, device=None) for pattern in patterns]
    again = [token_tables(pattern, 7, 7, 50, 4, device=None) for pattern in patterns]
    assert all(tables is others for tables, others in zip(first, again, strict=True))


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (2, 4), (5, 7)], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=pattern_id)
def test_shared_cells(pattern: ScanPattern, size: tuple[int, int]) -> None:
    counts = Counter(cell for order in pattern.orders(*size).tolist() for cell in order if cell >= 0)
    assert pattern.shares_cells(*size) is all(counts[cell] == 1 for cell in range(size[0] * size[1]))


def test_same_name_and_size_but_another_function() -> None:
    there, back = (
        ScanPattern("mine", 1, stacked(raster)),
        ScanPattern("mine", 1, stacked(reversed_order(raster))),
    )
    assert there.orders(1, 3).tolist() == [[0, 1, 2]]
    assert back.orders(1, 3).tolist() == [[2, 1, 0]]


def test_a_table_from_inference_mode_serves_training() -> None:
    with torch.inference_mode():
        orders = CROSS.orders(3, 4)
    weights = torch.ones(12, requires_grad=True)
    weights[CROSS.orders(3, 4)].sum().backward()
    assert CROSS.orders(3, 4) is orders
    assert weights.grad is not None
    assert (weights.grad == 4).all()


def test_fake_and_transformed_tensors_stay_out_of_the_cache() -> None:
    with FakeTensorMode():
        assert isinstance(CROSS.orders(3, 4, "cpu"), FakeTensor)
    torch.func.grad(lambda x: (x[CROSS.orders(3, 4)] ** 2).sum())(torch.ones(12))
    assert len(known.CACHE) == 0
    with torch.device("meta"):
        orders = CROSS.orders(3, 4)
    assert orders.device.type == "cpu"
    assert CROSS.orders(3, 4, "meta").device.type == "meta"
    assert CROSS.orders(3, 4) is orders


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tables_live_on_the_device() -> None:
    on_gpu = CROSS.orders(5, 7, "cuda")
    assert on_gpu.device == torch.device("cuda", torch.cuda.current_device())
    assert CROSS.orders(5, 7, on_gpu.device) is on_gpu
    assert torch.equal(on_gpu.cpu(), CROSS.orders(5, 7))


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=pattern_id)
def test_patterns_can_be_pickled(pattern: ScanPattern) -> None:
    again = pickle.loads(pickle.dumps(pattern))
    assert repr(again) == repr(pattern)
    assert torch.equal(again.orders(5, 6), pattern.orders(5, 6))


@pytest.mark.parametrize("side", [0, -3, 2.0, "4", None, True])
def test_bad_sides(side: object) -> None:
    with pytest.raises(ValueError, match=r"height must be an integer of at least 1, got"):
        CROSS.orders(side, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"width must be an integer of at least 1, got"):
        CROSS.padded(4, side)  # type: ignore[arg-type]


def test_bad_order_functions() -> None:
    with pytest.raises(ValueError, match=r"'flat' must return integers of shape \(1, steps\), got .* \(12,\)"):
        ScanPattern("flat", 1, raster).orders(3, 4)
    with pytest.raises(ValueError, match=r"'few' must return integers of shape \(4, steps\), got .* \(2, 12\)"):
        ScanPattern("few", 4, both_ways(raster)).orders(3, 4)
    with pytest.raises(ValueError, match=r"'real' must return integers .* got torch.float32"):
        ScanPattern("real", 1, lambda grid: grid.float()[:1]).orders(3, 4)
    with pytest.raises(ValueError, match=r"'far' .* cells 0\.\.11 of a 3 x 4 grid, got 1\.\.12"):
        ScanPattern("far", 1, lambda grid: grid.flatten()[None] + 1).orders(3, 4)
    with pytest.raises(ValueError, match=r"'holes' \(pad_to=1\) must name cells 0\.\.11 .* got -1\.\.11"):
        ScanPattern("holes", 4, ATROUS.order_fn).orders(4, 3)


@pytest.mark.parametrize("build", [partial(local_windows, 0), partial(ScanPattern, "none", 0, raster)])
def test_bad_parameters(build: partial) -> None:
    with pytest.raises(ValueError, match="must be an integer of at least 1, got 0"):
        build()


def test_lookup() -> None:
    assert all(get_pattern(name) is pattern for name, pattern in PATTERNS.items())
    assert get_pattern(CROSS) is CROSS
    with pytest.raises(ValueError, match="unknown scan pattern 'hilber'; did you mean hilbert"):
        get_pattern("hilber")
    with pytest.raises(ValueError, match=r"unknown scan pattern 'xyz'; known: forward, .*local_windows_7"):
        get_pattern("xyz")


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (2, 4), (5, 7), (7, 14)], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=pattern_id)
def test_visits(pattern: ScanPattern, size: tuple[int, int]) -> None:
    cells = size[0] * size[1]
    tokens = range(cells + pattern.padded(*size))
    counts = [Counter(order) for order in pattern.orders(*size, pad_index=cells).tolist()]
    together = sum(counts, Counter())
    found = pattern.visits(*size)
    assert found is not None
    assert found.repeats is any(count[p] > 1 for count in counts for p in tokens)
    assert found.complete is all(count[p] == 1 for count in counts for p in tokens)
    assert found.disjoint is all(together[p] <= 1 for p in tokens)
    assert found.covers is all(together[p] >= 1 for p in tokens)


@pytest.mark.parametrize("size", [(4, 4), (5, 7)])
def test_tables_are_orders_visits_and_padding(size: tuple[int, int]) -> None:
    cells = size[0] * size[1]
    orders, visits, padded = ATROUS.tables(*size, torch.device("cpu"))
    assert torch.equal(orders, ATROUS.orders(*size, pad_index=cells))
    assert visits == ATROUS.visits(*size) and padded is ATROUS.padded(*size)
    assert ATROUS.tables(*size, torch.device("cpu"))[0] is orders
    with FakeTensorMode():
        assert isinstance(ATROUS.tables(*size, torch.device("cpu"))[0], FakeTensor)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:DeprecationWarning")
def test_visits_are_found_while_others_trace() -> None:
    expected = ATROUS.visits(5, 7)
    with torch.inference_mode(), FakeTensorMode():
        assert ScanPattern("again", 4, ATROUS.order_fn, pad_to=2).visits(5, 7) == expected
    shown = []

    def function(x: Tensor) -> Tensor:
        shown.append(ScanPattern("once more", 4, ATROUS.order_fn, pad_to=2).visits(5, 7))
        return x.sum()

    torch.func.vmap(torch.func.grad(function))(torch.ones(2, 3))
    torch.jit.trace(function, torch.ones(3))
    assert shown[0] == expected
    assert shown[1] is None


class Known(nn.Module):
    """Adds 1 where the visits are known, by what is known."""

    def forward(self, x: Tensor) -> Tensor:
        visits = ATROUS.visits(*x.shape)
        return x if visits is None else x + 1 + visits.repeats


def test_compiled_visits_are_constants() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Known(), fullgraph=True, backend="aot_eager", dynamic=False)
    assert compiled(torch.zeros(4, 6)).unique().tolist() == [1]
    assert compiled(torch.zeros(5, 7)).unique().tolist() == [2]
    torch._dynamo.reset()
    compiled = torch.compile(Known(), fullgraph=True, backend="aot_eager", dynamic=True)
    assert compiled(torch.zeros(5, 7)).unique().tolist() == [0]
    sides = {"x": {0: torch.export.Dim("height", min=2, max=64), 1: torch.export.Dim("width", min=2, max=64)}}
    for strict in (False, True):
        assert (
            torch.export.export(Known(), (torch.zeros(5, 7),), strict=strict).module()(torch.zeros(5, 7)) == 2
        ).all()
        program = torch.export.export(Known(), (torch.zeros(5, 7),), dynamic_shapes=sides, strict=strict)
        assert (program.module()(torch.zeros(4, 7)) == 0).all()


class Gather(nn.Module):
    """The tokens of a channels-last map in the order of their visits, zeros in padded slots."""

    def __init__(self, pattern: ScanPattern) -> None:
        super().__init__()
        self.pattern = pattern

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        tokens = x.flatten(1, 2)
        if self.pattern.padded(height, width):
            tokens = torch.cat([tokens, tokens.new_zeros(batch, 1, channels)], dim=1)
        return tokens[:, self.pattern.orders(height, width, x.device, pad_index=height * width)]


COMPILED_SIZES = [(4, 6), (5, 7), (7, 3)]


def feature_map(height: int, width: int) -> Tensor:
    return torch.arange(1.0, 1 + 2 * height * width).view(1, height, width, 2)


@pytest.mark.parametrize(
    "pattern, dynamic",
    [
        *((pattern, True) for pattern in [*FAMILY_PATTERNS, local_windows(3)]),
        (ATROUS, False),
        (HILBERT, False),
    ],
    ids=pattern_id,
)
def test_compile(pattern: ScanPattern, dynamic: bool) -> None:
    torch._dynamo.reset()
    module = Gather(pattern)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in COMPILED_SIZES:
        assert torch.equal(compiled(feature_map(*size)), module(feature_map(*size)))


@pytest.mark.parametrize(
    "pattern, strict",
    [*((pattern, False) for pattern in [*FAMILY_PATTERNS, SPIRAL, local_windows(3)]), (ATROUS, True)],
    ids=pattern_id,
)
def test_export_with_dynamic_sides(pattern: ScanPattern, strict: bool) -> None:
    module = Gather(pattern)
    sides = {1: torch.export.Dim("height", min=2, max=64), 2: torch.export.Dim("width", min=2, max=64)}
    program = torch.export.export(module, (feature_map(6, 10),), dynamic_shapes={"x": sides}, strict=strict)
    exported = program.module()
    for size in COMPILED_SIZES:
        assert torch.equal(exported(feature_map(*size)), module(feature_map(*size)))
    names = [str(node.target) for node in program.graph.nodes]
    assert any("new_zeros" in name for name in names) is (pattern.pad_to > 1)


def test_hilbert_is_not_exported_with_dynamic_sides() -> None:
    sides = {1: torch.export.Dim("height", min=2, max=64), 2: torch.export.Dim("width", min=2, max=64)}
    with pytest.raises(torch._dynamo.exc.UserError, match="marked height as dynamic but your code specialized"):
        torch.export.export(Gather(HILBERT), (feature_map(6, 10),), dynamic_shapes={"x": sides})
    program = torch.export.export(Gather(HILBERT), (feature_map(6, 10),))
    assert torch.equal(program.module()(feature_map(6, 10)), Gather(HILBERT)(feature_map(6, 10)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace() -> None:
    # Tools that count operations trace models this way; sizes are tensors there.
    traced = torch.jit.trace(Gather(ATROUS), (feature_map(5, 6),))
    assert torch.equal(traced(feature_map(5, 6)), Gather(ATROUS)(feature_map(5, 6)))


@pytest.mark.parametrize("name", PATTERNS)
def test_compiled_programs_take_the_table_as_it_is(name: str) -> None:
    pattern, calls = PATTERNS[name], []

    def compiler(module: torch.fx.GraphModule, _inputs: object) -> Callable:
        calls.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    def table(grid: Tensor) -> Tensor:
        return pattern.orders(*grid.shape, pad_index=grid.numel()) + 0

    torch.compiler.reset()
    grid = torch.zeros(5, 7)
    assert torch.equal(torch.compile(table, fullgraph=True, dynamic=False, backend=compiler)(grid), table(grid))
    assert any("scan_orders" in call for call in calls) and not any("arange" in call for call in calls)


@pytest.mark.parametrize("name", ["cross", "atrous"])
def test_registration(name: str) -> None:
    torch.library.opcheck(torch.ops.backbones.scan_orders.default, (torch.empty(0), name, 5, 7, 35))
