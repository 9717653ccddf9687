"""The C++ kernel: every instruction set, size and layout against float64, determinism over threads, errors."""

import ctypes
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from backbones.ops import native, selective_scan
from backbones.ops.scan import cpu, naive

pytestmark = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))

ISAS = ("avx512", "avx2", "baseline")
NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")


@contextmanager
def instruction_set(name):
    before = native.instruction_set()
    try:
        native.select(native.loaded(), name)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        yield
    finally:
        native.select(native.loaded(), before)


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make(b, l, k, c, n, shared=True, seed=0, rank=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    projection = {"dt_weight": randn(k, c, rank) * rank**-0.5} if rank else {}
    return projection | {
        "u": randn(b, l, c) if shared else randn(b, l, k, c),
        "delta": randn(b, l, k, rank or c) - 1,
        "A": -torch.rand(k, c, n, generator=g) * 4 - 0.1,
        "B": randn(b, l, k, n),
        "C": randn(b, l, k, n),
        "D": randn(k, c),
        "delta_bias": randn(k, c),
    }


def make_orders(kind, k, l, seed=0):
    g = torch.Generator().manual_seed(seed)
    if kind is None:
        return None
    if kind == "permute":
        return torch.stack([torch.randperm(l, generator=g) for _ in range(k)])
    if kind == "skip":  # each order visits some tokens, few or none in common
        return torch.stack([torch.randperm(l, generator=g)[: max(l // 2, 1)] for _ in range(k)])
    return torch.randint(l, (k, l + 5), generator=g)  # repeats some, skips some


def run(scan, tensors, grad_seed=1, **options):
    """(y, gradients by name), with a random upstream gradient."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items() if x is not None}
    y = scan(**leaves, **options)
    grad = (
        torch.randn(y.shape, generator=torch.Generator().manual_seed(grad_seed)).bfloat16().to(y.dtype)
    )  # exact in all
    return y.detach(), dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True))


def reference(tensors, **options):
    return run(
        naive.selective_scan_naive, {name: None if x is None else x.double() for name, x in tensors.items()}, **options
    )


def error(x, expected):
    scale = expected.abs().max().clamp_min(1e-30)
    return ((x.double() - expected).abs().max() / scale).item()


def check(tensors, tolerance, grad_tolerance, **options):
    y, grads = run(lambda **kw: selective_scan(**kw, backend="cpu"), tensors, **options)
    y_ref, grads_ref = reference(tensors, **options)
    assert error(y, y_ref) < tolerance, "y"
    for name, grad in grads.items():
        assert grad.shape == tensors[name].shape and grad.dtype == tensors[name].dtype
        assert error(grad, grads_ref[name]) < grad_tolerance, name


# float32 against float64, relative to the largest element: rounding in sums of up to a few hundred terms
F32 = dict(tolerance=1e-6, grad_tolerance=4e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [0, 3, 8, 200])
@pytest.mark.parametrize("n", [1, 2, 7, 16])
@pytest.mark.parametrize("rank", [0, 5])
def test_parity_on_every_instruction_set(isa, n, window, rank):
    with instruction_set(isa):
        check(make(2, 131, 2, 83, n, rank=rank), **F32, orders=make_orders("permute", 2, 131), local_window=window)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("out", ["sum", "per_order", "per_step"])
@pytest.mark.parametrize("kind", [None, "permute", "skip", "repeat"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("n", [1, 5])
def test_orders_and_outputs(isa, out, kind, shared, n):
    with instruction_set(isa):
        check(make(2, 37, 3, 40, n, shared), **F32, orders=make_orders(kind, 3, 37), out=out)


@pytest.mark.parametrize("out", ["sum", "per_order", "per_step"])
@pytest.mark.parametrize("kind", [None, "skip", "repeat"])
@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16(isa, out, kind, n, rank):
    tensors = make(2, 70, 2, 35, n, rank=rank)
    for name in ("u", "delta", "B", "C"):
        tensors[name] = tensors[name].bfloat16()
    with instruction_set(isa):  # inputs are exact in float64, results are rounded once to 8 bits: 2^-8 = 3.9e-3
        check(tensors, 4e-3, 4e-3, orders=make_orders(kind, 2, 70), out=out)


def alike(tensors, orders):
    """The arguments with which every order has the decays of the first one at each of its steps."""
    k = len(orders)
    delta = tensors["delta"].clone()
    for order in range(1, k):
        delta[:, orders[order], order] = tensors["delta"][:, orders[0], 0]
    shared = {name: tensors[name][:1].expand(k, *tensors[name].shape[1:]) for name in ("A", "delta_bias", "dt_weight")}
    return tensors | shared | {"delta": delta}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [2, 3, 16])
@pytest.mark.parametrize("kind", ["permute", "skip"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_orders_that_decay_alike(isa, n, kind, dtype):
    orders = make_orders(kind, 4, 150)
    tensors = alike(make(2, 150, 4, 83, n, rank=5), orders)
    for name in ("u", "delta", "B", "C"):
        tensors[name] = tensors[name].to(getattr(torch, dtype))
    with instruction_set(isa):
        check(tensors, **(F32 if dtype == "float32" else dict(tolerance=4e-3, grad_tolerance=4e-3)), orders=orders)


@pytest.mark.parametrize("name", ["delta", "A", "delta_bias", "dt_weight"])
def test_orders_that_decay_almost_alike(name):
    # One number of the last order differs, at its last step or in its last channel.
    orders = make_orders("permute", 3, 70)
    tensors = {key: x.contiguous() for key, x in alike(make(2, 70, 3, 20, 4, rank=2), orders).items()}
    if name == "delta":
        tensors["delta"][-1, orders[-1, -1], -1, -1] += 3
    else:
        tensors[name][-1, -1] += 3 if name != "A" else -3
    check(tensors, **F32, orders=orders)


def test_images_of_a_batch_may_decay_alike_or_not():
    orders = make_orders("permute", 2, 40)
    tensors = make(2, 40, 2, 40, 4, rank=3)
    like = alike(tensors, orders)
    like["delta"] = torch.stack([like["delta"][0], tensors["delta"][1]])
    check(like, **F32, orders=orders)


@pytest.mark.parametrize("l, c", [(1, 1), (1, 7), (2, 16), (5, 17), (64, 33), (65, 1), (129, 200), (200, 8)])
@pytest.mark.parametrize("n", [1, 3, 16])
@pytest.mark.parametrize("window", [0, 4])
def test_odd_sizes(l, c, n, window):
    check(make(1, l, 1, c, n), **F32, local_window=window)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("missing", ["D", "delta_bias", "softplus"])
def test_optional_parts(n, missing):
    tensors = make(2, 20, 2, 24, n)
    if missing == "softplus":
        tensors["delta"] = tensors["delta"].abs() * 0.1
        tensors["delta_bias"] = tensors["delta_bias"].abs() * 0.1
        check(tensors, **F32, delta_softplus=False)
    else:
        tensors[missing] = None
        check(tensors, **F32)


@pytest.mark.parametrize("n", [1, 4])
def test_strides_are_taken_as_they_are(n):
    b, l, k, c = 2, 50, 2, 24
    plain = make(b, l, k, c, n)
    x_proj = torch.randn(b, l, k, 2 * n + 3, generator=torch.Generator().manual_seed(3))
    plain["B"], plain["C"] = x_proj[..., 3 : 3 + n], x_proj[..., 3 + n :]
    strided = dict(plain)
    strided["delta"] = plain["delta"].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)  # a (k, b, l, c) buffer
    strided["u"] = plain["u"].mT.contiguous().mT  # channels first: the kernel has to copy
    contiguous = {name: x.contiguous() for name, x in plain.items()}
    orders = make_orders("permute", k, l)
    y, states = cpu.forward(*arguments(contiguous, orders), True, "sum", 0, True)
    y2, states2 = cpu.forward(*arguments(strided, orders), True, "sum", 0, True)
    assert torch.equal(y, y2) and torch.equal(states, states2)
    grad = torch.ones(1, 1, 1).expand(b, l, c)
    grads = cpu.backward(grad.contiguous(), *arguments(contiguous, orders), states, True, "sum", 0)
    grads2 = cpu.backward(grad, *arguments(strided, orders), states, True, "sum", 0)
    for name, one, two in zip((*NAMES, "dt_weight"), grads, grads2, strict=True):
        assert torch.equal(one, two) and two.is_contiguous(), name


def arguments(tensors, orders=None):
    orders = None if orders is None else orders.int().contiguous()
    return (*(tensors[name] for name in NAMES[:6]), orders, tensors["delta_bias"], tensors.get("dt_weight"))


@pytest.mark.parametrize(
    "n, window, rank, decays_alike",
    [(1, 0, 0, False), (1, 8, 3, False), (16, 0, 3, False), (16, 8, 0, False), (16, 0, 3, True)],
)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("b, c", [(1, 200), (3, 72)])
def test_bitwise_equal_for_any_number_of_threads(b, c, n, window, rank, shared, decays_alike):
    orders = make_orders("permute", 2, 150)
    tensors = make(b, 150, 2, c, n, shared, rank=rank)
    tensors = alike(tensors, orders) if decays_alike else tensors
    options = dict(orders=orders, local_window=window, backend="cpu")
    results = []
    for count in (1, 2, 3, 8):
        with threads(count):
            y, grads = run(selective_scan, tensors, **options)
            results.append([y, *grads.values()])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", ISAS)
def test_softplus_and_decay_over_their_whole_range(isa):
    # One step with u = B = C = 1 gives y = dt, and a second one exp(dt A) + 1 times it.
    x = torch.cat([torch.linspace(-80, 80, 4001), torch.tensor([-20.0, 0.0, 20.0, 88.0])])
    c = len(x)
    delta = torch.stack([x, x])[None, :, None]
    one = torch.ones(1, 2, 1, 1)
    with instruction_set(isa):
        y = selective_scan(torch.ones(1, 2, c), delta, torch.full((1, c, 1), -0.5), one, one, backend="cpu")[0].double()
    dt = torch.nn.functional.softplus(x.double())
    assert ((y[0] - dt).abs() / dt).max() < 4e-7
    expected = dt * (1 + torch.exp(-0.5 * dt))
    assert ((y[1] - expected).abs() / expected).max() < 1e-6


@pytest.mark.parametrize("isa", ISAS)
def test_strong_decay_is_zero_and_nan_flows(isa):
    tensors = make(1, 5, 1, 40, 2)
    tensors["A"] = tensors["A"] * 1e4
    with instruction_set(isa):
        y = selective_scan(**tensors, backend="cpu")
        assert error(y, reference(tensors)[0]) < 1e-6
        tensors["u"][0, 2, 7] = float("nan")
        y = selective_scan(**tensors, backend="cpu")
    assert y[0, :, 7].isnan().tolist() == [False, False, True, True, True]
    assert not y[0, :, :7].isnan().any() and not y[0, :, 8:].isnan().any()


def test_every_output_is_written(monkeypatch):
    # Poisoned memory shows elements that the kernel leaves alone.
    def poisoned(self, shape):
        return torch.full(tuple(shape), float("nan"), dtype=self.dtype)

    orders = make_orders("skip", 2, 300).int().contiguous()  # 150 steps: two states are kept
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for n, window, rank in ((3, 0, 0), (3, 5, 4), (1, 0, 4), (1, 5, 0), (3, 0, 4)):
        tensors = make(2, 300, 2, 20, n, rank=rank)
        tensors = alike(tensors, orders.long()) if (n, window, rank) == (3, 0, 4) else tensors
        y, states = cpu.forward(*arguments(tensors, orders), True, "sum", window, True)
        assert states.numel() > 0
        grads = cpu.backward(torch.ones_like(y), *arguments(tensors, orders), states, True, "sum", window)
        assert not any(x.isnan().any() for x in (y, states, *grads))


@pytest.mark.parametrize("token", [-1, 9])
def test_order_out_of_range(token):
    orders = torch.arange(9).repeat(2, 1)
    orders[1, 4] = token
    with pytest.raises(ValueError, match=rf"orders: found token {token}, expected 0\.\.8"):
        selective_scan(**make(1, 9, 2, 8, 4), orders=orders, backend="cpu")


CSRC = Path(native.__file__).parent / "csrc"
C_TYPES = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}


def fields_in_c(struct: str) -> list[tuple[str, type]]:
    """Names and types of a struct's fields, from the headers; those of a nested struct with its name in front."""
    sources = "".join(path.read_text(encoding="utf-8") for path in sorted(CSRC.glob("*.h")))
    (body,) = re.findall(rf"^struct {struct} {{(.*?)^}};", re.sub(r"//.*", "", sources), re.MULTILINE | re.DOTALL)
    fields = []
    for kind, names in re.findall(r"(?:const )?(\w+)\b([^;]*);", body):
        for name in names.split(","):
            if kind == "Strides":
                fields += [(f"{name.strip()}_{axis}", inner) for axis, inner in fields_in_c(kind)]
            else:
                fields.append((name.strip(" *\n"), ctypes.c_void_p if "*" in name else C_TYPES[kind]))
    return fields


@pytest.mark.parametrize(
    "struct, record",
    [("Call", native.ScanCall)]
    + [(record.__name__, record) for record in (native.ConvCall, native.GateCall, native.NormCall)],
)
def test_records_have_the_fields_of_the_structs_in_c(struct, record):
    assert list(record._fields_) == fields_in_c(struct)


def test_a_record_has_no_other_fields():
    with pytest.raises(AttributeError, match="window_size"):
        native.ScanCall(window_size=3)


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="BACKBONES_CPU_ISA='sse9' is not one of avx512, avx2, baseline"):
        native.select(native.loaded(), "sse9")
    code = "from backbones.ops import native; print(native.instruction_set())"
    env = {**os.environ, "BACKBONES_CPU_ISA": "baseline"}
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == "baseline"


def test_missing_and_broken_library(monkeypatch, tmp_path):
    native.library.cache_clear()
    try:
        monkeypatch.setattr(native, "LIBRARY", tmp_path / "_scan_cpu.so")
        assert "install a C++17 compiler" in native.unavailable_reason()
        with pytest.raises(ValueError, match="install a C\\+\\+17 compiler"):
            selective_scan(**make(1, 4, 1, 8, 1), backend="cpu")
        native.library.cache_clear()
        native.LIBRARY.write_bytes(b"not a library")
        assert "does not load" in native.unavailable_reason()
    finally:
        monkeypatch.undo()
        native.library.cache_clear()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [1, 16])
def test_errors_do_not_pile_up_over_long_recurrences(isa, n):
    """Step sizes of a trained model: a state remembers some hundred steps, and with them any bias of exp."""
    t = make(1, 2000, 2, 32, n)
    t |= {"delta": t["delta"] * 0.5, "delta_bias": t["delta_bias"] * 0.7 - 4.5}
    exact = {name: x.double() for name, x in t.items()}
    expected = selective_scan(**exact, backend="naive")
    with instruction_set(isa):
        found = selective_scan(**t, backend="cpu")
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error <= 1.6e-7  # float32's own rounding, one term after the other, makes it 0.5e-7 to 1.2e-7
