"""One rule chooses the backend of every operator, with the same errors."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from backbones import ops
from backbones.ops import dispatch, native
from backbones.ops.fused.row_sums.operator import row_sums
from backbones.ops.fused.state_output.operator import state_output
from backbones.ops.scan.decay import decay_rates
from backbones.patterns.resampling import upsampling
from backbones.patterns.taps import window_taps


def _scan(x: Tensor, backend: str | None) -> Tensor:
    one = torch.ones(1, 4, 1, 1, dtype=x.dtype)
    return ops.selective_scan(x, x.unsqueeze(2), -one[0, :1].expand(1, 3, 1), one, one, backend=backend)


def _ssd(x: Tensor, backend: str | None) -> Tensor:
    one = torch.ones(1, 4, 1, 1, dtype=x.dtype)
    return ops.ssd(x.unsqueeze(2), x[..., :1], -one[0, 0, 0], one, one, backend=backend)


# Each on x (1, 4, 3).
CALLS: dict[str, Callable[[Tensor, str | None], Tensor]] = {
    "selective_scan": _scan,
    "depthwise_conv": lambda x, backend: ops.depthwise_conv(
        x, torch.ones(1, 3, 9, dtype=x.dtype), None, *window_taps(2, 2, 3), backend=backend
    ),
    "silu_gate": lambda x, backend: ops.silu_gate(x, x, backend=backend),
    "rms_norm": lambda x, backend: ops.rms_norm(x, torch.ones(3, dtype=x.dtype), 1e-5, backend=backend),
    "layer_norm": lambda x, backend: ops.layer_norm(x, None, None, 1e-5, backend=backend),
    "row_sums": lambda x, backend: row_sums(x, x, upsampling((2, 2), (2, 2), "bilinear"), backend=backend),
    "state_output": lambda x, backend: state_output(x, x[..., :1], x, x[0, 0], x.dtype, backend=backend),
    "decay_rates": decay_rates,
    "ssd": _ssd,
}
WITH_CPU = [name for name, operator in dispatch.OPERATORS.items() if "cpu" in operator.kernels.values()]
X = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0))
needs_kernel = pytest.mark.skipif(native.unavailable_reason() is not None, reason="needs the compiled kernel")


def test_every_operator_is_called_here() -> None:
    assert CALLS.keys() == dispatch.OPERATORS.keys()


@pytest.mark.parametrize("name", CALLS)
def test_unknown_names(name: str) -> None:
    names = ", ".join(dispatch.OPERATORS[name].names)
    with pytest.raises(ValueError, match=f"^backend: got 'cuda', expected one of {names}, or None$"):
        CALLS[name](X, "cuda")


@pytest.mark.parametrize("name", [name for name in CALLS if name != "ssd"])
def test_a_named_backend_runs_or_says_why_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^backend: 'cpu' cannot run here: it has no double precision"):
        CALLS[name](X.double(), "cpu")
    with pytest.raises(ValueError, match=r"^backend: 'cpu' cannot run here: the tensors are on cuda$"):
        dispatch.choose(name, "cpu", "cuda", torch.float32)
    monkeypatch.setattr(native, "unavailable_reason", lambda: "no compiler was found")
    with pytest.raises(ValueError, match=r"^backend: 'cpu' cannot run here: no compiler was found$"):
        CALLS[name](X, "cpu")


@pytest.mark.parametrize("name", CALLS)
def test_every_backend_is_right(name: str) -> None:
    expected = CALLS[name](X.double(), "naive")
    for backend in dispatch.OPERATORS[name].names:
        if backend != "triton" and dispatch.unavailable_reason(backend) is None:  # GPUs have tests of their own
            torch.testing.assert_close(CALLS[name](X, backend).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(CALLS[name](X, None).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_only_slow_fallbacks_are_told(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "unavailable_reason", lambda: f"no compiler for {name}")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            CALLS[name](X, None)
    slow = dispatch.OPERATORS[name].slow
    told = [f"{name} falls back to the slow 'naive' backend: no compiler for {name}"] if slow else []
    assert [record.getMessage() for record in caplog.records] == told


@needs_kernel
@pytest.mark.parametrize("name", WITH_CPU)
def test_a_named_kernel_refuses_derivatives_that_it_lacks(name: str) -> None:
    way_out = f"^{name}: this backend has no forward-mode .*scan_backend='naive'"
    with pytest.raises(NotImplementedError, match=way_out):
        torch.func.jvp(lambda x: CALLS[name](x, "cpu"), (X,), (X,))
    with pytest.raises(NotImplementedError, match=way_out):
        torch.func.grad(lambda x: CALLS[name](x, "cpu").sum())(X)


@pytest.mark.parametrize("name", CALLS)
def test_unnamed_an_operator_refuses_only_where_plain_pytorch_is_slow(name: str) -> None:
    def call() -> Tensor:
        return torch.func.jvp(lambda x: CALLS[name](x, None), (X,), (X,))[1]

    if dispatch.OPERATORS[name].slow and native.unavailable_reason() is None:
        with pytest.raises(NotImplementedError, match=name):
            call()
    else:
        torch.testing.assert_close(call(), torch.func.jvp(lambda x: CALLS[name](x, "naive"), (X,), (X,))[1])


def test_derivatives_are_asked_for_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def is_transformed(*tensors: Tensor | None) -> bool:
        asked.append(len(tensors))
        return False

    monkeypatch.setattr(dispatch, "is_transformed", is_transformed)
    for name in ("selective_scan", "depthwise_conv", "silu_gate", "rms_norm", "layer_norm"):
        asked.clear()
        CALLS[name](X, None)
        assert len(asked) == 1, name
