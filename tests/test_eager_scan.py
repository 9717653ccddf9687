"""Scans of a kind that was there before do what the first did: by a recording, and without checks; in the interpreter
where there is no GPU.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from backbones.ops import Visits, selective_scan
from backbones.ops.scan import api
from backbones.ops.scan.operator import scan_op
from tests.kernels import DEVICE, RUNS, launch_by_the_library, needs_kernels, quiet
from tests.operator_cases import Case
from tests.scripts import run_in_the_interpreter

pytest.importorskip("triton")
from backbones.ops import recorded

pytestmark = quiet

Given = dict[str, Any]
SMALL = Case(b=1, length=4, k=2, c=3, n=2)
ONE = replace(SMALL, n=1, shared_u=True)
WINDOW = Case(b=1, length=34, k=1, c=1, n=1, window=34)  # of one chunk, or the interpreter would take long
TABLES: dict[str, list[list[int]] | None] = {
    "none": None,
    "permutations": [[3, 1, 0, 2], [0, 3, 2, 1]],
    "disjoint": [[3, 1], [2, 0]],
    "skips": [[3, 1], [0, 3]],
    "repeats": [[3, 3], [0, 2]],
}
NAMES = ("u", "delta", "A", "B", "C", "D", "orders", "delta_bias", "dt_weight")


@pytest.mark.skipif(RUNS, reason="the kernels run in this process")
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def _every_first_call_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "SEEN", 0)
    monkeypatch.setattr(api, "_eager_scans", {})


def arguments(case: Case, call: int, table: list[list[int]] | None = None, dtype: torch.dtype = torch.float32) -> Given:
    """Of ``selective_scan``, of one kind and with other numbers for each ``call``."""
    given: Given = {
        name: None if x is None else x.detach().to(DEVICE) for name, x in case.tensors(dtype, seed=call).items()
    }
    if table is not None:
        given["orders"] = torch.tensor(table, dtype=torch.int32, device=DEVICE)
    return {**given, **case.options(), "backend": "triton"}


def results(run: Callable[..., Tensor], given: Given) -> list[Tensor]:
    """Without gradients, with them, and the gradients."""
    with torch.no_grad():
        found = [run(**given)]
    leaves = {
        name: x.detach().requires_grad_() for name, x in given.items() if isinstance(x, Tensor) and name != "orders"
    }
    y = run(**{**given, **leaves})
    grad = torch.linspace(-1, 1, y.numel(), device=DEVICE).view(y.shape).bfloat16().to(y.dtype)
    return [*found, y.detach(), *torch.autograd.grad(y, list(leaves.values()), grad)]


def by_the_operator(**given: Any) -> Tensor:
    """The scan where nothing is recorded; for tensors in the operator's dtypes."""
    tensors = [given[name] for name in NAMES]
    save = torch.is_grad_enabled()
    options = given["delta_softplus"], given["out"], given["local_window"]
    visits = given.get("visits")
    return scan_op(*tensors, *options, save, None if visits is None else [*visits], "triton")[0]


def check(given: Given) -> None:
    """Compares a call with what the operator does."""
    for a, b in zip(results(selective_scan, given), results(by_the_operator, given), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()


def programs() -> int:
    kinds = [kind for scan in api._eager_scans.values() for kind in scan._recordings._kinds.values()]
    return sum([callable(kind) for kind in kinds])


MODES = {
    "": SMALL,
    "one state": ONE,
    "window": WINDOW,
    "per order, no D": replace(SMALL, out="per_order", skip=False),
    "per step, no bias": replace(ONE, out="per_step", bias=False),
    "per step, window, no softplus": replace(WINDOW, out="per_step", softplus=False),
    "two chunks": Case(b=1, length=66, k=1, c=2, n=1),
    "two blocks of channels": Case(b=1, length=2, k=2, c=33, n=2, shared_u=True),  # a sum of two has one order
}


@needs_kernels
@pytest.mark.parametrize("case", MODES.values(), ids=MODES.keys())
def test_recorded_modes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_by_the_library(monkeypatch)
    results(selective_scan, arguments(case, 0))
    check(arguments(case, 1))
    assert programs() == 3  # without gradients, with them, and backward


@needs_kernels
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_recorded_tables(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_by_the_library(monkeypatch)
    for out, knows in (("sum", False), ("per_order", table is not None)):
        case = replace(ONE, out=out)
        for call in range(2):
            given = arguments(case, call, table)
            given["visits"] = Visits.of(given["orders"], 4) if knows else None
            check(given) if call else results(selective_scan, given)
    assert programs() == (0 if table == TABLES["repeats"] else 6)


@needs_kernels
def test_dtypes_and_determinism_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    launch_by_the_library(monkeypatch)
    case = MODES["two blocks of channels"]
    for call in range(2):
        for dtype, deterministic in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
            torch.use_deterministic_algorithms(deterministic)
            given = arguments(case, call, dtype=dtype)
            check(given) if call else results(selective_scan, given)
            torch.use_deterministic_algorithms(False)
    assert len(api._eager_scans) == 2 and programs() == 9


def transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def behind_one(x: Tensor) -> Tensor:
    """At an address that is no multiple of 16."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


@needs_kernels
def test_layouts_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    launch_by_the_library(monkeypatch)
    layouts: list[Callable[[Tensor], Tensor]] = [lambda x: x, transposed, behind_one]
    for call in range(2):
        for lay_out in layouts:
            given = arguments(SMALL, call, TABLES["permutations"])
            laid_out = {name: lay_out(x) if isinstance(x, Tensor) else x for name, x in given.items()}
            check(laid_out)
    assert len(api._eager_scans) == 1


@needs_kernels
def test_numbers_are_brought_to_one_dtype() -> None:
    """By each call: weights in half precision, u in another dtype than B, orders in int64."""
    for call in range(3):
        given = arguments(ONE, call, TABLES["permutations"])
        halves = {name: given[name].bfloat16() for name in ("u", "A", "D", "delta_bias")}
        found = results(selective_scan, {**given, **halves, "orders": given["orders"].long()})
        wanted = results(selective_scan, {**given, **{name: x.float() for name, x in halves.items()}})
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b.to(a.dtype))
        assert found[0].dtype == torch.bfloat16


@needs_kernels
def test_projected_steps_are_not_recorded() -> None:
    for call in range(3):
        check(arguments(replace(ONE, rank=2), call))
    assert programs() == 0 and len(api._eager_scans) == 1


@needs_kernels
def test_one_table_is_looked_at_again_when_it_changes() -> None:
    given = arguments(ONE, 0, TABLES["permutations"])
    for first in (3, 1, 3):  # the second repeats it
        given["orders"][0, 0] = first
        check(given)
    given["orders"][0, 0] = 4
    with pytest.raises(ValueError, match=r"orders: found token 4, expected 0\.\.3"):
        selective_scan(**given)


WRONG = {
    "u": (lambda x: x[:, :, :2], "u: got shape"),
    "delta": (lambda x: x.tolist(), "delta: got list, expected a tensor"),
    "A": (lambda x: x.to("meta"), "A: got a tensor on meta"),
    "B": (lambda x: x.int(), "B: got dtype torch.int32"),
    "C": (lambda x: None, "C: got NoneType"),
    "D": (lambda x: x[:1], "D: got shape"),
    "orders": (lambda x: x.float(), "orders: got dtype"),
    "delta_bias": (lambda x: x.to("meta"), "delta_bias: got a tensor on meta"),
    "out": (lambda x: ["sum"], "out: got"),
    "local_window": (lambda x: -1, "local_window: got -1"),
    "visits": (lambda x: [True] * 4, "visits: got list"),
    "backend": (lambda x: "cuda", "backend: got 'cuda'"),
}


@needs_kernels
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_told_behind_right_ones(name: str) -> None:
    given = arguments(ONE, 0, TABLES["permutations"])
    change, message = WRONG[name]
    for _ in range(2):
        selective_scan(**given)
        with pytest.raises(ValueError, match=message):
            selective_scan(**{**given, name: change(given.get(name))})


@needs_kernels
def test_calls_that_are_watched_go_through_the_operator() -> None:
    given = arguments(ONE, 0)
    for _ in range(2):
        selective_scan(**given)
    counted = []
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            if backward:
                results(selective_scan, given)
            else:
                selective_scan(**given)
        counted.append(counter.get_total_flops())
    assert 0 < counted[0] < counted[1]


@needs_kernels
@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces_hold_the_operator() -> None:
    given = arguments(ONE, 0)
    for _ in range(2):
        selective_scan(**given)
    traced = torch.jit.trace(lambda u: selective_scan(**{**given, "u": u}), given["u"], check_trace=False)
    assert "backbones::selective_scan" in str(traced.graph)


@needs_kernels
def test_derivatives_that_kernels_lack_are_refused_behind_recordings() -> None:
    given = arguments(ONE, 0)
    u = given["u"].clone().requires_grad_()
    for _ in range(2):
        selective_scan(**{**given, "u": u}).sum().backward()
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda u: selective_scan(**{**given, "u": u}).sum())(given["u"])
    (du,) = torch.autograd.grad(selective_scan(**{**given, "u": u}).sum(), u, create_graph=True)
    assert torch.equal(du, u.grad / 2)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        du.sum().backward()


class Subclass(Tensor):
    """A tensor with operators of its own."""


@needs_kernels
def test_subclasses_and_empty_batches_are_not_remembered() -> None:
    given = arguments(ONE, 0)
    for _ in range(2):
        wanted = selective_scan(**given)
    found = selective_scan(**{**given, "u": given["u"].as_subclass(Subclass)})
    assert torch.equal(found.as_subclass(Tensor), wanted)
    empty = {name: given[name][:0] for name in ("u", "delta", "B", "C")}
    for _ in range(2):
        assert selective_scan(**{**given, **empty}).shape == (0, 4, 3)
    assert len(api._eager_scans) == 1


@needs_kernels
def test_inference_mode_and_gradients_take_turns() -> None:
    given = arguments(ONE, 0)
    wanted = results(by_the_operator, given)
    for _ in range(3):
        with torch.inference_mode():
            assert torch.equal(selective_scan(**given), wanted[0])
        for a, b in zip(results(selective_scan, given), wanted, strict=True):
            assert torch.equal(a, b) and not a.is_inference()


@needs_kernels
def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_MOST", 2)
    for length in range(1, 5):
        selective_scan(**arguments(replace(ONE, length=length, c=1, k=1), 0))
    assert len(api._eager_scans) == 2


def test_other_backends_are_not_remembered() -> None:
    given = {name: None if x is None else x.cpu() for name, x in ONE.tensors(torch.float32).items()}
    for backend in ("naive", None):
        selective_scan(**given, backend=backend)
    assert not api._eager_scans
