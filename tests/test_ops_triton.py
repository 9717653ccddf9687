"""The Triton kernels against float64, on the GPU if there is one, else in Triton's interpreter (some 50 us an
instruction).

The interpreter must be asked for before Triton is first imported, which another test file may have done: without a GPU
these tests are skipped here and run by ``test_in_the_interpreter`` in a process of their own.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch

import backbones.ops.scan.triton as backend
from backbones.layers import SS2D, MambaMixer, Scan
from backbones.ops import Visits, selective_scan
from backbones.ops.scan import api, naive
from backbones.ops.scan.triton import tables
from backbones.patterns import ATROUS, BIDIRECTIONAL, CROSS, ScanPattern
from tests.kernels import DEVICE, RUNS, quiet
from tests.operator_cases import CASES, Case
from tests.scripts import run_in_the_interpreter
from tests.tolerances import OPERATOR

pytest.importorskip("triton")
needs_kernels = pytest.mark.usefixtures("poisoned")
pytestmark = quiet
NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")
OUTPUTS = ("sum", "per_order", "per_step")
QUARTERS = ScanPattern("quarters", 4, ATROUS.order_fn, pad_to=2)  # a table of its own, which that of ATROUS may not be

SMALL = Case(b=1, length=7, k=2, c=5, n=3)
QUICK = {
    "shared u, one state": Case(b=2, length=9, k=2, c=3, n=1, shared_u=True),
    "per order, no D, no softplus": replace(SMALL, out="per_order", skip=False, softplus=False),
    "per step, no bias": replace(SMALL, out="per_step", bias=False),
    "one of everything": CASES["one of everything"],
    "repeats and skips": replace(SMALL, steps=10, shared_u=True),
    "repeats, per order": replace(SMALL, k=1, steps=10, out="per_order"),
    "two chunks, two blocks of channels": Case(b=1, length=66, k=1, c=33, n=2),
    "window": Case(b=1, length=8, k=1, c=3, n=2, window=3, shared_u=True),
}
SLOW = {
    **CASES,
    "window, repeats, per step": replace(SMALL, steps=9, window=4, out="per_step"),
    "window of two chunks": Case(b=1, length=150, k=2, c=3, n=2, window=70, shared_u=True),
    "many states": Case(b=1, length=6, k=1, c=9, n=40),
}


@pytest.mark.skipif(RUNS, reason="the kernels run in this process")
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


@pytest.mark.slow
@pytest.mark.skipif(RUNS, reason="the kernels run in this process")
def test_in_the_interpreter_at_length() -> None:
    run_in_the_interpreter(__file__, "slow")


@pytest.fixture
def launch() -> ModuleType:
    """The module with the launches."""
    if not RUNS:
        pytest.skip("needs a GPU or TRITON_INTERPRET=1: see test_in_the_interpreter")
    from backbones.ops.scan.triton import launch

    return launch


@pytest.fixture
def poisoned(launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Fills every buffer with NaN before it is handed out, and lists them."""
    buffers = []

    def empty(shape, dtype, device):
        buffers.append(torch.full(shape, float("nan"), dtype=dtype, device=device))
        return buffers[-1]

    monkeypatch.setattr(launch, "empty", empty)
    return buffers


@pytest.fixture(params=["carried by the scan", "carried by a kernel"])
def segmented(launch: ModuleType, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """As on a GPU with so many multiprocessors that every scan is cut into the shortest segments."""
    monkeypatch.setattr(api, "_eager_scans", {})
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 10**6)
    monkeypatch.setattr(launch, "_CARRIED", 100 if request.param == "carried by the scan" else 0)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def relative_error(x: torch.Tensor, expected: torch.Tensor) -> float:
    scale = expected.norm().item()
    return (x.detach().cpu().double() - expected).norm().item() / (scale if scale > 0 else 1)


def check(tensors: dict, options: dict, dtype: torch.dtype = torch.float32) -> None:
    """Output and every gradient of the kernels against ``naive`` in float64, from the same rounded inputs."""
    tolerance = OPERATOR["float32" if dtype == torch.float32 else "bfloat16"]
    orders = tensors["orders"]
    exact = {
        name: x.detach().double().requires_grad_() for name, x in tensors.items() if x is not None and name != "orders"
    }
    expected = naive.selective_scan_naive(
        *(exact.get(name) for name in NAMES[:6]), orders, exact.get("delta_bias"), exact.get("dt_weight"),
        options["delta_softplus"], options["out"], options["local_window"],
    )  # fmt: skip
    grad = torch.randn(expected.shape, dtype=torch.float64).to(dtype)
    expected_grads = torch.autograd.grad(expected, list(exact.values()), grad.double())

    given = {
        name: None if x is None else x.detach().to(DEVICE).requires_grad_(name != "orders")
        for name, x in tensors.items()
    }
    y = selective_scan(**given, **options, backend="triton")
    assert y.dtype == dtype
    assert relative_error(y, expected.detach()) <= tolerance
    grads = torch.autograd.grad(y, [given[name] for name in exact], grad.to(DEVICE))
    for name, x, want in zip(exact, grads, expected_grads, strict=True):
        assert x.shape == tensors[name].shape
        assert x.dtype == tensors[name].dtype
        assert relative_error(x, want) <= tolerance, name


@needs_kernels
@pytest.mark.parametrize("case", QUICK.values(), ids=QUICK.keys())
def test_float32(case: Case) -> None:
    check(case.tensors(torch.float32), case.options())


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SLOW.values(), ids=SLOW.keys())
def test_every_mode(case: Case, dtype: torch.dtype) -> None:
    check(case.tensors(dtype), case.options(), dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    case = replace(SMALL, shared_u=True)
    check(case.tensors(dtype), case.options(), dtype)


TABLES = {
    "permutations": [[3, 1, 5, 0, 2, 4], [0, 5, 4, 3, 2, 1]],
    "skips, tokens shared": [[3, 1, 5], [0, 5, 4]],
    "skips, disjoint": [[3, 1], [0, 5]],
    "all tokens, disjoint": [[3, 1, 2], [4, 0, 5]],
}


@needs_kernels
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_tables_without_repeats(table: list, out: str, shared: bool) -> None:
    if DEVICE == "cpu" and (out == "per_step" or shared is (out == "per_order")):
        pytest.skip("on a GPU only, to save time: covered by halves")
    case = Case(b=1, length=6, k=2, c=2, n=1, shared_u=shared, out=out)
    check({**case.tensors(torch.float32), "orders": torch.tensor(table)}, case.options())


@needs_kernels
@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("table", [*TABLES.values(), [[3, 3, 5], [0, 5, 4]]], ids=[*TABLES, "repeats"])
def test_given_visits_are_those_that_it_would_find(
    table: list, out: str, launch: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE == "cpu" and out == "per_order":
        pytest.skip("on a GPU only, to save time: writes as the sum of tables that are not disjoint")
    monkeypatch.setattr(launch, "order_facts", look_up)
    orders = torch.tensor(table)
    case = Case(b=1, length=6, k=2, c=2, n=1, shared_u=True, out=out)
    check({**case.tensors(torch.float32), "orders": orders}, {**case.options(), "visits": Visits.of(orders, 6)})


def look_up(orders: torch.Tensor | None, length: int, k: int) -> Visits:
    """Stands for the look that waits for the device."""
    assert orders is None, "looked at orders whose visits are known"
    return tables.order_facts(None, length, k)


@needs_kernels
@pytest.mark.parametrize(
    ("pattern", "size"),
    [(CROSS, (3, 2)), (QUARTERS, (3, 2)), (QUARTERS, (2, 4)), (ATROUS, (3, 2))],
    ids=["permutations", "padded", "disjoint", "atrous"],
)
def test_a_compiled_map_scan_never_looks_at_its_orders(
    pattern: ScanPattern, size: tuple[int, int], launch: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer = SS2D(3, Scan(pattern), d_state=1, ssm_ratio=1, gated=False).to(DEVICE)
    check_compiled(mixer, (torch.randn(1, *size, 3, device=DEVICE),), launch, monkeypatch)


@needs_kernels
@pytest.mark.parametrize(("pattern", "tokens"), [(BIDIRECTIONAL, 7), (CROSS, 7), (CROSS, 6)])
def test_a_compiled_token_scan_never_looks_at_its_orders(
    pattern: ScanPattern, tokens: int, launch: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer = MambaMixer(2, Scan(pattern), d_state=1, expand=1).to(DEVICE)
    check_compiled(mixer, (torch.randn(1, tokens, 2, device=DEVICE), (3, 2)), launch, monkeypatch)


def check_compiled(
    mixer: SS2D | MambaMixer, inputs: tuple, launch: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and gradients against ``naive``, while the kernels may not look at a table."""
    torch._dynamo.reset()
    mixer.ssm.backend = "naive"
    expected = mixer(*inputs)
    parameters = list(mixer.parameters())
    expected_grads = torch.autograd.grad(expected.square().sum(), parameters)
    monkeypatch.setattr(launch, "order_facts", look_up)
    mixer.ssm.backend = "triton"
    y = torch.compile(mixer, fullgraph=True, backend="aot_eager")(*inputs)
    grads = torch.autograd.grad(y.square().sum(), parameters)
    for found, want in zip((y, *grads), (expected, *expected_grads), strict=True):
        assert relative_error(found, want.detach().cpu().double()) <= 1e-4  # of float32 sums in another order


@needs_kernels
@pytest.mark.parametrize("out", ["sum", pytest.param("per_step", marks=pytest.mark.slow)])
def test_segments(out: str, segmented: None) -> None:
    case = Case(b=1, length=130, k=1, c=2, n=1, out=out)
    check(case.tensors(torch.float32), case.options())


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 16])
def test_more_segments(n: int, segmented: None) -> None:
    case = Case(b=2, length=730, k=2, c=17, n=n, shared_u=True)
    check(case.tensors(torch.float32), case.options())
    check({**case.tensors(torch.float32), "orders": torch.randint(0, 730, (2, 300))}, case.options())


@needs_kernels
def test_deterministic_mode_sums_blocks_in_order(deterministic: None) -> None:
    case = Case(b=1, length=5, k=2, c=70, n=2)
    check(case.tensors(torch.float32), case.options())


@needs_kernels
@pytest.mark.slow
def test_deterministic_mode_gives_the_same_bits(deterministic: None) -> None:
    case = Case(b=2, length=197, k=4, c=70, n=16, shared_u=True)
    given = {name: x for name, x in case.tensors(torch.float32).items() if x is not None}
    tensors = {name: x.detach().to(DEVICE).requires_grad_() for name, x in given.items()}
    runs = []
    for _ in range(3):
        y = selective_scan(**tensors, backend="triton")
        runs.append([y, *torch.autograd.grad(y.square().sum(), list(tensors.values()))])
    for other in runs[1:]:
        assert all(torch.equal(x, x_first) for x, x_first in zip(other, runs[0], strict=True))


@needs_kernels
def test_views_of_a_projection() -> None:
    """delta, B and C as slices of one buffer with channels in odd places, u not contiguous: strides are taken
    as they are.
    """
    case = Case(b=2, length=4, k=2, c=3, n=2)
    tensors = case.tensors(torch.float32)
    projected = torch.randn(2, 4, 2, 3 + 2 + 2 + 1)
    _, delta, B, C = (x.detach() for x in projected.split([1, 3, 2, 2], dim=-1))
    u = torch.randn(2, 3, 4, 2).permute(0, 2, 3, 1)
    check({**tensors, "u": u, "delta": delta, "B": B, "C": C}, case.options())


@needs_kernels
def test_nan_flows_through_later_steps_only() -> None:
    tensors = replace(SMALL, k=1, n=1).tensors(torch.float32)
    tensors["u"].data[0, 4] = float("nan")
    given = {name: None if x is None else x.to(DEVICE) for name, x in tensors.items()}
    y = selective_scan(**given, backend="triton")
    assert y[0, :4].isfinite().all()
    assert y[0, 4:].isnan().all()


@needs_kernels
def test_orders_out_of_range() -> None:
    tensors = SMALL.tensors(torch.float32)
    for bad in (7, -1):
        tensors["orders"] = torch.tensor([[0, 1], [bad, 2]])
        given = {name: None if x is None else x.to(DEVICE) for name, x in tensors.items()}
        with pytest.raises(ValueError, match=rf"orders: found token {bad}, expected 0\.\.6"):
            selective_scan(**given, backend="triton")


def test_facts_of_a_table_are_found_once_and_again_when_it_changes() -> None:
    orders = torch.arange(6, dtype=torch.int32, device=DEVICE).view(2, 3)
    facts = tables.order_facts(orders, 6, 2)
    assert facts == Visits(repeats=False, complete=False, disjoint=True, covers=True)
    assert tables.order_facts(orders[:], 6, 2) is facts
    orders[0, 0] = 1
    assert tables.order_facts(orders, 6, 2) == Visits(True, False, False, False)


def test_memory_is_as_the_traffic_model_says(
    launch: ModuleType, poisoned: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward "sum": a value an order and token, and their sum. Backward: du likewise, ddelta, partial sums."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 0)
    b, length, k, c, n, e = 1, 5, 2, 33, 2, 2
    tensors = Case(b, length, k, c, n, shared_u=True).tensors(torch.bfloat16)
    args = [None if tensors[name] is None else tensors[name].detach().to(DEVICE) for name in NAMES]
    args = [*args[:6], None, args[6], True]

    def allocated() -> int:
        total = sum(x.numel() * x.element_size() for x in poisoned)
        poisoned.clear()
        return total

    y, states = launch.forward(*args, "sum", 0, True)
    per_order = b * length * k * c
    assert allocated() == per_order * e + y.numel() * e
    assert states.shape == backend.states_shape(b, length, k, c, n)
    config = launch.backward_config(n, c, b * k, 0)
    torch.use_deterministic_algorithms(True)
    launch.backward(torch.ones_like(y), *args[:8], states, True, "sum", 0)
    torch.use_deterministic_algorithms(False)
    blocks = -(-c // config.BLOCK_C)
    scratch = k * blocks * (64 // config.U) * config.N * config.BLOCK_C * 4
    of_B_and_C = 2 * blocks * b * length * k * n * 4
    per_batch = b * k * c * (n + 2) * 4
    assert allocated() == (2 * per_order + b * length * c) * e + scratch + of_B_and_C + per_batch


def test_import_is_light() -> None:
    code = "import sys, backbones.ops; print(any(m.startswith('backbones.ops.scan.triton.') for m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_reason_says_how_to_run_without_a_gpu() -> None:
    code = "import backbones.ops.scan.triton as triton; print(triton.unavailable_reason())"
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "TRITON_INTERPRET=1" in result.stdout


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_cpu_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a GPU"):
        selective_scan(**SMALL.tensors(torch.float32), backend="triton")
