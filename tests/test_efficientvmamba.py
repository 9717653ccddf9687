"""What a GPU runs of EfficientVMamba's blocks in fewer launches, run here on a CPU, against their layers."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from backbones.layers import SS2D, Scan, convolutions
from backbones.models import efficientvmamba
from backbones.models.efficientvmamba import EVSSBlock, InvertedResidual
from backbones.patterns import ATROUS

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "EVSSBlock": lambda: EVSSBlock(16, partial(SS2D, scan=Scan(ATROUS)), drop_path=0.5),
    "InvertedResidual": lambda: InvertedResidual(16, drop_path=0.5),
}


@pytest.fixture(params=BLOCKS)
def block(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    block = BLOCKS[request.param]()
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.3)
    return block


@pytest.fixture
def in_few_launches(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def switch() -> None:
        for module, condition in (
            (efficientvmamba, "counts_launches"), (convolutions, "counts_launches"), (convolutions, "_multiplies"),
        ):  # fmt: skip
            monkeypatch.setattr(module, condition, lambda x: True)

    return switch


def passes(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output of a training step with one draw of stochastic depth, all gradients, and what the block keeps."""
    torch.manual_seed(1)
    block.zero_grad()
    x = x.clone().requires_grad_()
    y = block(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    assert x.grad is not None
    grads = {name: weight.grad for name, weight in block.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in block.named_buffers()}
    return {"output": y.detach(), "input's gradient": x.grad, **grads, **buffers}


@pytest.mark.parametrize("shape", [(3, 6, 8, 16), (2, 5, 7, 16), (1, 2, 2, 16), (2, 1, 3, 16)])
def test_few_launches_compute_the_layers(
    block: nn.Module, in_few_launches: Callable[[], None], shape: tuple[int, ...]
) -> None:
    block.double()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # both passes begin alike
            module.num_batches_tracked = None
    x = torch.randn(shape, dtype=torch.float64)
    expected = passes(block, x)
    in_few_launches()
    found = passes(block, x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_few_launches_under_autocast(block: nn.Module, in_few_launches: Callable[[], None]) -> None:
    block.eval()
    x = torch.randn(2, 6, 8, 16)
    exact = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        layers = block(x)
        in_few_launches()
        found, of_half = block(x), block(x.bfloat16())
    assert found.dtype == layers.dtype == torch.float32 and of_half.dtype == torch.bfloat16
    scale = (exact - x).abs().max()
    assert (found - exact).abs().max() < 0.02 * scale and (layers - exact).abs().max() < 0.02 * scale


@torch.no_grad()
def test_no_image(block: nn.Module, in_few_launches: Callable[[], None]) -> None:
    in_few_launches()
    assert block.eval()(torch.empty(0, 4, 6, 16)).shape == (0, 4, 6, 16)
