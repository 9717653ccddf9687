"""The selective scan: every backend against float64, autograd, the original's recordings, and torch's own checks."""

import re

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from backbones import ops
from backbones.commands.bench.measure import relative_error
from backbones.ops import native, selective_scan
from backbones.ops.scan.naive import selective_scan_naive
from backbones.ops.scan.operator import scan_op
from tests.operator_cases import CASES, PLAIN, Case
from tests.tolerances import OPERATOR
from tools.recordings import load_arrays

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def textbook(case: Case, t: dict[str, Tensor | None]) -> Tensor:
    """The recurrence written as in the papers, one number of one order at a time, windows by their definition."""
    if t["dt_weight"] is not None:
        t = {**t, "delta": torch.einsum("blkr,kcr->blkc", t["delta"], t["dt_weight"])}
    b, length, k, c = t["delta"].shape
    orders = torch.arange(length).expand(k, length) if t["orders"] is None else t["orders"]
    delta = t["delta"] + (0 if t["delta_bias"] is None else t["delta_bias"])
    dt = torch.log1p(torch.exp(delta)) if case.softplus else delta
    y = torch.zeros(b, orders.shape[1], k, c, dtype=torch.float64)
    for j in range(k):
        p = orders[j]
        u = t["u"][:, p] if t["u"].dim() == 3 else t["u"][:, p, j]
        a = torch.exp(dt[:, p, j, :, None] * t["A"][j])
        x = (dt[:, p, j] * u)[..., None] * t["B"][:, p, j, None, :]
        for s in range(len(p)):
            h = torch.zeros_like(x[:, 0])
            for past in range(s + 1):
                h = a[:, past] * h + x[:, past]
            if case.window > 1:
                last = min(len(p), (s // case.window + 1) * case.window) - 1
                for later in range(s + 1, last + 1):
                    h = h + torch.prod(a[:, s:later], dim=1) * x[:, later]
            y[:, s, j] = (h * t["C"][:, p[s], j, None, :]).sum(-1)
            if t["D"] is not None:
                y[:, s, j] += t["D"][j] * u[:, s]
    if case.out == "per_step":
        return y
    merged = torch.zeros(b, length, k, c, dtype=torch.float64)
    for j in range(k):
        for s, p in enumerate(orders[j]):
            merged[:, p, j] += y[:, s, j]
    return merged if case.out == "per_order" else merged.sum(2)


def scan(case: Case, tensors: dict[str, Tensor | None], backend: str) -> Tensor:
    return selective_scan(**tensors, **case.options(), backend=backend)


def gradients(y: Tensor, tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    leaves = {name: x for name, x in tensors.items() if x is not None and x.requires_grad}
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad((y.double() * weights).sum(), leaves.values())
    return dict(zip(leaves, grads, strict=True))


@cases
def test_naive_is_the_textbook_recurrence(case: Case) -> None:
    if case.length > 70:
        pytest.skip("the textbook form is quadratic")
    tensors = case.tensors()
    with torch.no_grad():
        torch.testing.assert_close(scan(case, tensors, "naive"), textbook(case, tensors), rtol=1e-10, atol=1e-10)


@cases
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outputs_and_gradients(case: Case, dtype: str, backend: str) -> None:
    given = case.tensors(getattr(torch, dtype))
    exact = {
        name: x.detach().double().requires_grad_() if x is not None and x.is_floating_point() else x
        for name, x in given.items()
    }
    expected = selective_scan_naive(**exact, **case.options())
    found = scan(case, given, backend)
    assert found.dtype == given["u"].dtype
    assert relative_error(found, expected) <= OPERATOR[dtype]
    expected_gradients, found_gradients = gradients(expected, exact), gradients(found, given)
    for name, x in expected_gradients.items():
        assert found_gradients[name].dtype == given[name].dtype
        if x.abs().max() > 0:
            assert relative_error(found_gradients[name], x) <= OPERATOR[dtype], name
        else:
            assert not found_gradients[name].any(), name


@pytest.mark.parametrize("length", [1, 3, 129, 257])
def test_recorded_windows_of_lbmamba(length: int, backend: str) -> None:
    arrays, meta = load_arrays("op_lbm_scan")
    recorded = {name.split("_", 1)[1]: x for name, x in arrays.items() if name.startswith(f"L{length}_")}
    sequences = {name: recorded[name].transpose(1, 2) for name in ("u", "delta", "B", "C", "z", "g")}
    given = {
        "u": sequences["u"],
        **{name: sequences[name].unsqueeze(2) for name in ("delta", "B", "C")},
        **{name: recorded[name].unsqueeze(0) for name in ("A", "D", "delta_bias")},
    }
    given = {name: x.clone().requires_grad_() for name, x in given.items()}
    gate = torch.nn.functional.silu(sequences["z"])
    plain = selective_scan(**given, backend=backend) * gate
    local = selective_scan(**given, local_window=meta["window"][str(length)], backend=backend) * gate
    assert relative_error(plain, recorded["out_plain"].transpose(1, 2)) <= OPERATOR["float32"]
    assert relative_error(local, recorded["out_lbm"].transpose(1, 2)) <= OPERATOR["float32"]
    (local * sequences["g"]).sum().backward()
    for name, x in given.items():
        expected = recorded[f"grad_{name}"]
        found = (
            x.grad.squeeze(0)
            if name in ("A", "D", "delta_bias")
            else x.grad.reshape(sequences[name].shape).transpose(1, 2)
        )
        if expected.abs().max() > 0:
            assert relative_error(found, expected) <= OPERATOR["float32"], name


@pytest.mark.parametrize(
    "name", ["plain", "repeats and skips", "window, repeats", "per order", "no softplus", "projected"]
)
def test_gradcheck(name: str) -> None:
    case = CASES[name]
    tensors = Case(**{**vars(case), "b": 1, "length": 5, "c": 2, "n": 2}).tensors()
    leaves = {name: x for name, x in tensors.items() if x is not None and x.requires_grad}

    def function(*values: Tensor) -> Tensor:
        return scan(case, {**tensors, **dict(zip(leaves, values, strict=True))}, "naive")

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize(
    "name", ["plain", "shared u", "no D", "repeats and skips", "window", "per step", "one state", "projected"]
)
def test_opcheck(name: str, backend: str) -> None:
    case = CASES[name]
    t = case.tensors(torch.float32)
    orders = None if t["orders"] is None else t["orders"].int()
    args = (t["u"], t["delta"], t["A"], t["B"], t["C"], t["D"], orders, t["delta_bias"], t["dt_weight"])
    visits = None if orders is None else [True, False, False, False]
    torch.library.opcheck(scan_op, (*args, case.softplus, case.out, case.window, True, visits, backend))


@pytest.mark.parametrize("name", ["shared u", "repeats and skips", "window, sixteen states", "projected"])
def test_compiles_whole_and_exports(name: str, backend: str) -> None:
    if backend == "naive" and CASES[name].length > 20:
        pytest.skip("unrolled in backward: minutes to compile")
    case = CASES[name]
    tensors = case.tensors(torch.float32)
    expected = scan(case, tensors, backend)
    compiled = torch.compile(lambda t: scan(case, t, backend), fullgraph=True, backend="aot_eager")(tensors)
    assert torch.equal(compiled, expected)
    for found, wanted in zip(gradients(compiled, tensors).values(), gradients(expected, tensors).values(), strict=True):
        torch.testing.assert_close(found, wanted)

    class Scan(torch.nn.Module):
        def forward(self, t: dict[str, Tensor | None]) -> Tensor:
            return scan(case, t, backend)

    detached = {name: x if x is None else x.detach() for name, x in tensors.items()}
    exported = torch.export.export(Scan(), (detached,)).module()
    assert torch.equal(exported(detached), expected)


@pytest.mark.parametrize("name", ["plain", "projected"])
def test_flops_are_counted(name: str) -> None:
    case = CASES[name]
    tensors = case.tensors(torch.float32)
    with FlopCounterMode(display=False) as counter:
        scan(case, tensors, "naive")
    steps = case.b * case.length * case.k * case.c
    assert counter.get_total_flops() == 9 * steps * case.n + steps + 2 * steps * case.rank


def test_backends_that_look_at_orders_need_no_visits(backend: str) -> None:
    case = CASES["repeats and skips"]
    tensors = case.tensors(torch.float32)
    expected = scan(case, tensors, backend)
    wrong = ops.Visits(repeats=False, complete=True, disjoint=True, covers=True)
    found = selective_scan(**tensors, **case.options(), visits=wrong, backend=backend)
    assert torch.equal(found, expected)
    for x, y in zip(gradients(found, tensors).values(), gradients(expected, tensors).values(), strict=True):
        assert torch.equal(x, y)


def test_strides_do_not_matter(backend: str) -> None:
    case = CASES["sixteen states"]
    tensors = case.tensors(torch.float32)
    expected = scan(case, tensors, backend)
    strided = dict(tensors)
    for name in ("u", "delta", "B", "C"):
        b, length, k, m = tensors[name].shape
        strided[name] = torch.empty(k, b, length, 2 * m).permute(1, 2, 0, 3)[..., ::2].copy_(tensors[name].detach())
    for name in ("A", "D", "delta_bias"):
        strided[name] = tensors[name].detach().movedim(0, -1).contiguous().movedim(-1, 0)
    assert not any(strided[name].is_contiguous() for name in ("u", "delta", "A"))
    assert torch.equal(scan(case, strided, backend), expected)


def test_batch_rows_are_independent(backend: str) -> None:
    tensors = CASES["one state"].tensors(torch.float32)
    rows = {name: x[1:] if name in ("u", "delta", "B", "C") else x for name, x in tensors.items()}
    both = scan(CASES["one state"], tensors, backend)
    assert torch.equal(scan(CASES["one state"], rows, backend), both[1:])


def test_nan_flows_through(backend: str) -> None:
    tensors = {name: x if x is None else x.detach() for name, x in PLAIN.tensors(torch.float32).items()}
    tensors["u"][0, 4, 0, 2] = torch.nan
    y = selective_scan(**tensors, out="per_order", backend=backend)
    assert y[0, 4:, 0, 2].isnan().all()
    assert y.isnan().sum() == PLAIN.length - 4


def test_mixed_dtypes_follow_u(backend: str) -> None:
    tensors = PLAIN.tensors(torch.float32)
    expected = scan(PLAIN, tensors, backend)
    half = {**tensors, "u": tensors["u"].half(), "A": tensors["A"].double(), "D": tensors["D"].bfloat16()}
    found = scan(PLAIN, half, backend)
    assert found.dtype == torch.float16
    assert relative_error(found, expected.double()) < 5e-3
    assert gradients(found, half)["A"].dtype == torch.float64


BAD = {
    "u": [(torch.zeros(2, 13, 2, 6), r"u: got shape \(2, 13, 2, 6\), expected \(2, 13, 2, 5\)"),
          (torch.zeros(2, 13, 2, 5, dtype=torch.int64), "u: got dtype torch.int64"),
          (torch.zeros(2, 13, 2, 5, device="meta"), "delta: got a tensor on cpu, expected meta"),
          (None, "u: got NoneType, expected a tensor")],
    "delta": [(torch.zeros(2, 13, 5), "delta: got shape .* expected 4 dimensions"),
              (torch.zeros(2, 0, 2, 5), "delta: got an empty tensor"),
              (torch.zeros(0, 13, 2, 5), r"u: got shape \(2, 13, 2, 5\), expected \(0, 13, 2, 5\)")],
    "A": [(torch.zeros(2, 5), "A: got shape .* expected 3 dimensions"),
          (torch.zeros(2, 5, 0), "A: got an empty tensor"),
          (torch.zeros(3, 5, 4), r"A: got shape \(3, 5, 4\), expected \(2, 5, 4\)")],
    "B": [(torch.zeros(2, 13, 2, 3), r"B: got shape \(2, 13, 2, 3\), expected \(2, 13, 2, 4\)")],
    "C": [(torch.zeros(2, 12, 2, 4), "C: got shape")],
    "D": [(torch.zeros(5), r"D: got shape \(5,\), expected \(2, 5\)")],
    "delta_bias": [(torch.zeros(2, 1), "delta_bias: got shape")],
    "dt_weight": [(torch.zeros(2, 5, 3), r"dt_weight: got shape \(2, 5, 3\), expected \(2, 5, 5\) = \(k, c, r\)"),
                  (torch.zeros(2, 5, 5, dtype=torch.int64), "dt_weight: got dtype torch.int64")],
    "orders": [(torch.zeros(2, 3), "orders: got dtype torch.float32, expected an integer dtype"),
               (torch.zeros(3, 4, dtype=torch.int64), r"orders: got shape \(3, 4\), expected \(2, t\)"),
               (torch.zeros(2, 0, dtype=torch.int64), "orders: got shape"),
               (torch.full((2, 4), 13), r"orders: found token 13, expected 0\.\.12"),
               (torch.full((2, 4), -1), r"orders: found token -1, expected 0\.\.12")],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value", "message"), [(n, v, m) for n, rows in BAD.items() for v, m in rows])
def test_bad_tensors_are_named(name: str, value: Tensor, message: str, backend: str) -> None:
    tensors = {key: x if x is None else x.detach() for key, x in PLAIN.tensors(torch.float32).items()}
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**tensors, name: value}, backend=backend)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "mean"}, "out: got 'mean', expected one of sum, per_order, per_step"),
        ({"local_window": -1}, "local_window: got -1"),
        ({"visits": (False, True)}, "visits: got tuple, expected backbones.ops.Visits"),
        ({"backend": "cuda"}, "backend: got 'cuda', expected one of naive, cpu, triton, or None"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        selective_scan(**PLAIN.tensors(torch.float32), **options)


def test_a_named_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable_reason", lambda: "no compiler was found")
    with pytest.raises(ValueError, match="backend: 'cpu' cannot run here: no compiler was found"):
        scan(PLAIN, PLAIN.tensors(torch.float32), "cpu")
    with pytest.raises(ValueError, match="no double precision"):
        scan(PLAIN, PLAIN.tensors(), "cpu")


def test_automatic_choice_says_once_why_it_fell_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "unavailable_reason", lambda: "no compiler was found here")
    tensors = PLAIN.tensors(torch.float32)
    for _ in range(2):
        selective_scan(**tensors)
    assert [record.getMessage() for record in caplog.records] == [
        "selective_scan falls back to the slow 'naive' backend: no compiler was found here"
    ]


def test_backends_are_listed_with_reasons() -> None:
    assert ops.backends().keys() == {"naive", "cpu", "triton"}
    assert ops.backends()["naive"] is None
