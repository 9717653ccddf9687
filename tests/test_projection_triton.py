"""The projection of step sizes in Triton against float64: on a GPU, else in Triton's interpreter in another process."""

import os
import subprocess
import sys

import pytest
import torch

import backbones.ops.triton as backend
from tests.tolerances import OPERATOR

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = backend.unavailable_reason() is None
needs_kernels = pytest.mark.skipif(not RUNS, reason="needs a GPU or TRITON_INTERPRET=1: see test_in_the_interpreter")
# Of the interpreter's own making.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.mark.skipif(RUNS, reason="the kernels run in this process")
def test_in_the_interpreter() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", __file__],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]


def error(x: torch.Tensor, expected: torch.Tensor) -> float:
    assert x.shape == expected.shape
    return ((x.cpu().double() - expected).norm() / expected.norm()).item()


SHAPES = {  # b, l, k, c, r
    "one of everything": (1, 1, 1, 1, 1),
    "two blocks of channels and of rows": (3, 47, 2, 33, 6),
    "aligned": (2, 32, 2, 64, 16),
    "a rank above 16": (1, 9, 3, 40, 21),
}


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_product_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from backbones.ops.triton import projection

    def poisoned(shape, dtype, device):
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    monkeypatch.setattr(projection, "empty", poisoned)
    b, length, k, c, r = shape
    generator = torch.Generator().manual_seed(0)
    # As the model calls it: delta is a slice of wider rows, and the gradient is stored by token.
    wider = torch.randn(b, length, k, r + 5, generator=generator).to(dtype)
    weight = torch.randn(k, c, r, generator=generator).to(dtype).float()
    grad = torch.randn(b, length, k, c, generator=generator).to(dtype)
    delta = wider[..., 2 : 2 + r]
    exact = delta.double().requires_grad_(), weight.double().requires_grad_()
    expected = torch.einsum("blkr,kcr->blkc", *exact)
    wanted = torch.autograd.grad(expected, exact, grad.double())

    tolerance = OPERATOR["float32" if dtype == torch.float32 else "bfloat16"]
    delta = wider.to(DEVICE)[..., 2 : 2 + r]
    y = projection.per_order_linear(delta, weight.to(DEVICE))
    assert y.dtype == dtype and y.permute(2, 0, 1, 3).is_contiguous()
    assert error(y, expected.detach()) <= tolerance
    ddelta, dweight = projection.projection_gradients(grad.to(DEVICE), delta, weight.to(DEVICE))
    assert ddelta.dtype == dtype and ddelta.is_contiguous() and dweight.is_contiguous()
    assert error(ddelta, wanted[0]) <= tolerance
    assert dweight.dtype == torch.float32
    assert error(dweight, wanted[1]) <= OPERATOR["float32"]  # products of what was given are exact in float32
