"""The fused LayerNorm against PyTorch's in float64: on a GPU, else in Triton's interpreter in another process."""

import pytest
import torch
import torch.nn.functional as F

from backbones.layers.norm import LayerNorm
from backbones.ops import layer_norm
from tests.kernels import DEVICE, RUNS, error, needs_kernels, quiet
from tests.scripts import run_in_the_interpreter
from tests.tolerances import OPERATOR

pytest.importorskip("triton")
pytestmark = quiet


@pytest.mark.skipif(RUNS, reason="the kernels run in this process")
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 3, 7, 96), (700, 48), (3, 200)])
def test_agrees_with_pytorch_in_double_precision(shape: tuple[int, ...], affine: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    x, grad = (random(*shape).mul(2).add(3).to(dtype) for _ in range(2))
    parameters = [random(shape[-1]) for _ in range(2)] if affine else [None, None]
    exact = [None if t is None else t.double().requires_grad_() for t in (x, *parameters)]
    given = [None if t is None else t.to(DEVICE).requires_grad_() for t in (x, *parameters)]

    expected = F.layer_norm(exact[0], shape[-1:], exact[1], exact[2], 1e-3)
    y = layer_norm(*given, 1e-3, dtype=dtype, backend="triton")
    assert y.dtype == dtype
    tolerance = OPERATOR[str(dtype).removeprefix("torch.")]
    assert error(y.detach(), expected.detach()) <= tolerance

    wanted = torch.autograd.grad(expected, [t for t in exact if t is not None], grad.double())
    found = torch.autograd.grad(y, [t for t in given if t is not None], grad.to(DEVICE))
    for x, want in zip(found, wanted, strict=True):
        assert error(x, want) <= tolerance


@needs_kernels
def test_reads_rows_of_any_strides_and_writes_another_dtype() -> None:
    x = torch.randn(2, 6, 4, device=DEVICE).transpose(1, 2)
    y = layer_norm(x, None, None, 1e-5, dtype=torch.bfloat16, backend="triton")
    assert y.dtype == torch.bfloat16
    assert error(y, F.layer_norm(x.double(), (6,)).cpu()) <= OPERATOR["bfloat16"]


@pytest.mark.parametrize("backend", ["naive", None])
def test_other_dtypes_are_pytorchs_own_on_the_cpu(backend: str | None) -> None:
    norm = LayerNorm(6, eps=1e-3, dtype=torch.float64)
    norm.backend = backend
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    assert torch.equal(norm(x), F.layer_norm(x, (6,), norm.weight, norm.bias, 1e-3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("autocast_out", [False, True])
def test_autocast_rounds_within_a_branch_only(autocast_out: bool) -> None:
    norm = LayerNorm(6, autocast_out=autocast_out).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        assert norm(torch.randn(2, 6, device="cuda")).dtype == (torch.bfloat16 if autocast_out else torch.float32)
