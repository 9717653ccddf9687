"""The outputs of states, and the mixer that has them: kernels against float64."""

import pytest
import torch

from backbones.layers import StructureAwareSSM, set_backend
from backbones.ops.fused.state_output import naive
from tests.kernels import DEVICE, RUNS, error, needs_kernels, quiet
from tests.scripts import run_in_the_interpreter
from tests.tolerances import OPERATOR

pytestmark = quiet


@pytest.mark.skipif(RUNS, reason="the kernels run in this process")
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_in_the_interpreter(__file__)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("b", "length", "c"), [(1, 19, 1), (2, 7, 5), (2, 13, 96), (1, 1100, 2048), (3, 70, 33)])
def test_kernel(b: int, length: int, c: int, out: torch.dtype, dtype: torch.dtype, monkeypatch) -> None:
    """Of states in float32, and an input and C, which is a column of a product, in another dtype."""
    from backbones.ops.fused.state_output import triton
    from backbones.ops.fused.state_output.operator import state_output

    def poisoned(shape, dtype, device):
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    monkeypatch.setattr(triton, "empty", poisoned)
    generator = torch.Generator().manual_seed(0)
    states, product, wide, D, grad = (
        torch.randn(shape, generator=generator)
        for shape in ((b, length, c), (b, length, 4), (b, length, 2 * c), (1, c), (b, length, c))
    )
    given = [x.to(DEVICE) for x in (states, product.to(dtype)[..., 3:], wide.to(dtype)[..., c:], D)]
    exact = [x.detach().cpu().double().requires_grad_() for x in given]
    grad = grad.to(out)
    expected = naive.forward(*exact, torch.float64)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    leaves = [x.requires_grad_() for x in given]
    y = state_output(*leaves, out, backend="triton")
    found = torch.autograd.grad(y, leaves, grad.to(DEVICE))
    assert y.dtype == out and "StateOutput" in repr(y.grad_fn)
    for value, truth, its in zip((y, *found), (expected, *wanted), (out, *[x.dtype for x in given]), strict=True):
        assert value.dtype == its and value.is_contiguous()
        assert error(value, truth) <= OPERATOR["float32" if its == torch.float32 else "bfloat16"]
    with torch.no_grad():
        assert torch.equal(state_output(*given, out, backend="triton"), y)


@needs_kernels
def test_second_derivatives_are_refused() -> None:
    from backbones.ops.fused.state_output.operator import state_output

    x = torch.randn(1, 2, 3, device=DEVICE, requires_grad=True)
    y = state_output(x, x[..., :1], x, x[0, 0], torch.float32, backend="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="state_output: this backend has no second derivatives"):
        dx.sum().backward()


@needs_kernels
def test_mixer() -> None:
    """Spatial-Mamba's, with all that its kernels do, against plain PyTorch."""
    torch.manual_seed(0)
    layer = StructureAwareSSM(8).to(DEVICE)
    for parameter in (layer.fusion.weight, layer.ssm.D):
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 5, 8)

    def results(x: torch.Tensor, backend: str) -> list[torch.Tensor]:
        set_backend(layer, backend)
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        return [y, *torch.autograd.grad(y.square().sum(), (leaf, *layer.parameters()))]

    found = results(x.to(DEVICE), "triton")
    layer.double()
    for value, truth in zip(found, results(x.double().to(DEVICE), "naive"), strict=True):
        assert error(value, truth.cpu()) <= OPERATOR["float32"]
