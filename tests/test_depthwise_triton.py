"""The depthwise convolution in Triton against float64: on a GPU, else in Triton's interpreter in another process."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from tests.kernels import DEVICE, RUNS, error, needs_kernels, quiet
from tests.scripts import run_in_the_interpreter
from tests.tolerances import OPERATOR

pytest.importorskip("triton")
pytestmark = quiet


@pytest.mark.skipif(RUNS, reason="the kernels run in this process")
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


@dataclass(frozen=True)
class Case:
    b: int = 2
    length: int = 13
    c: int = 5
    k: int = 2
    taps: int = 4
    outputs: int = 13
    bias: bool = True
    silu: bool = True
    gelu: bool = False
    residual: bool = False

    def tables(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Every tap reads a token for one output at most, and some read none."""
        taps = torch.full((self.k, self.taps, self.outputs), -1)
        inverse = torch.full((self.k, self.taps, self.length), -1)
        for k in range(self.k):
            for j in range(self.taps):
                pairs = max(1, min(self.length, self.outputs) - j % 3)
                tokens = torch.randperm(self.length, generator=generator)[:pairs]
                outputs = torch.randperm(self.outputs, generator=generator)[:pairs]
                taps[k, j, outputs] = tokens
                inverse[k, j, tokens] = outputs
        return taps.int(), inverse.int()


def reference(x, weight, bias, taps, case):
    """Row by row, in the dtype of x; a tap of -1 reads the zero row behind the last."""
    padded = F.pad(x, (0, 0, 0, 1))
    y = torch.einsum("bkjmc,kcj->kbmc", padded[:, taps.long()], weight)
    y = y if bias is None else y + bias[:, None, None]
    y = x + y if case.residual else y
    return F.silu(y) if case.silu else F.gelu(y) if case.gelu else y


CASES = {
    "two orders": Case(),
    "no bias": replace(Case(), bias=False),
    "no SiLU": replace(Case(), silu=False),
    "GELU": replace(Case(), silu=False, gelu=True),
    "residual": Case(k=1, silu=False, residual=True),
    "residual and GELU": Case(k=1, silu=False, gelu=True, residual=True),
    "residual and SiLU, no bias": Case(k=1, bias=False, residual=True),
    "one of everything": Case(1, 1, 1, 1, 1, 1),
    "fewer outputs": Case(length=20, outputs=6, k=1, taps=9),
    "more outputs": Case(length=5, outputs=11, k=1, taps=3),
    "two blocks of channels and three of rows": Case(b=1, length=70, outputs=70, c=96, k=1, taps=2),
    "two groups of taps": Case(b=1, length=9, outputs=9, c=3, k=1, taps=11),
}


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_gradients(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, dtype, monkeypatch)


def check(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, strided: bool = False) -> None:
    from backbones.ops.depthwise import triton as depthwise

    def poisoned(shape, dtype, device):
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    monkeypatch.setattr(depthwise, "empty", poisoned)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    taps, inverse = case.tables(generator)
    x = normal(case.b, case.length, case.c).to(dtype)
    grad = normal(case.k, case.b, case.outputs, case.c).to(dtype)
    if strided:
        x = normal(case.length, case.b, 2 * case.c + 1).to(dtype).transpose(0, 1)[..., 1 : 1 + case.c]
        grad = normal(case.b, case.outputs, case.k, case.c).to(dtype).permute(2, 0, 1, 3)
    weight, bias = normal(case.k, case.c, case.taps), normal(case.k, case.c) if case.bias else None
    exact = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = reference(*exact, taps, case)
    wanted = torch.autograd.grad(expected, [t for t in exact if t is not None], grad.double())

    given = [None if t is None else t.to(DEVICE) for t in (x, weight, bias, taps, inverse)]
    options = case.silu, case.gelu, case.residual
    y = depthwise.forward(*given, *options)
    assert y.dtype == dtype and y.is_contiguous()
    tolerance = OPERATOR["float32" if dtype == torch.float32 else "bfloat16"]
    assert error(y, expected) <= tolerance
    dx, dweight, dbias = depthwise.backward(grad.to(DEVICE), *given, *options)
    assert dx.dtype == dtype and dweight.dtype == dbias.dtype == torch.float32
    assert dx.is_contiguous() and dweight.is_contiguous()
    assert error(dx, wanted[0]) <= tolerance
    # Sums of exact products of what was given: no rounding to the dtype of x.
    assert error(dweight, wanted[1]) <= OPERATOR["float32"]
    if case.bias:
        assert error(dbias, wanted[2]) <= OPERATOR["float32"]
    else:
        assert dbias.shape == (0,)


@needs_kernels
def test_strides_of_any_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    check(Case(length=9, outputs=9), torch.float32, monkeypatch, strided=True)


@needs_kernels
def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from backbones.ops.depthwise import triton as depthwise

    monkeypatch.setattr(depthwise, "_is_wide", lambda x: True)
    check(Case(length=5, outputs=5), torch.float32, monkeypatch)


@needs_kernels
def test_a_token_that_no_tap_reads_stays_unread() -> None:
    """NaN in it does not reach an output, and its gradient is zero."""
    from backbones.ops.depthwise import triton as depthwise

    x = torch.ones(1, 3, 2, device=DEVICE)
    x[0, 2] = float("nan")
    taps = torch.tensor([[[0, 1], [-1, 0]]], dtype=torch.int32, device=DEVICE)
    inverse = torch.tensor([[[0, 1, -1], [1, -1, -1]]], dtype=torch.int32, device=DEVICE)
    weight = torch.ones(1, 2, 2, device=DEVICE)
    y = depthwise.forward(x, weight, None, taps, inverse, False)
    assert y[0, 0, :, 0].tolist() == [1, 2]
    dx, _, _ = depthwise.backward(torch.ones_like(y), x, weight, None, taps, inverse, False)
    assert dx[0, :, 0].tolist() == [2, 1, 0]
