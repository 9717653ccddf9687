"""Casting a block's weights together against autocast's own casts, as it works on GPUs, here on the CPU."""

import pytest
import torch
from torch import nn

from backbones.base import contract
from backbones.layers import SelectiveSSM, half_weights
from tests.small_models import create_shallow, images, total

NAMES = ["vim_tiny", "vmamba_tiny_s1l8", "groupmamba_tiny"]


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_weights, "_DEVICE", "cpu")


def gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = total(model(images(2, 3, 64, 64)))
    y.backward()
    return y.detach(), {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_as_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = create_shallow(name).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    # The CPU's scan projects step sizes in float32 itself.
    monkeypatch.setattr(SelectiveSSM, "autocast_weights", ("x_proj_weight",))
    expected, wanted = gradients(model)
    monkeypatch.setattr(half_weights, "_DEVICE", "cpu")
    casts = []
    cast = half_weights.casts
    monkeypatch.setattr(half_weights, "casts", lambda weights, dtype: casts.append(dtype) or cast(weights, dtype))
    y, found = gradients(model)
    assert casts.count(torch.bfloat16) == casts.count(torch.float32) > 0  # once each way per block
    assert torch.equal(y, expected)
    assert found.keys() == wanted.keys()
    for key, want in wanted.items():
        assert found[key].dtype == torch.float32
        assert torch.equal(found[key], want), key


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.fc.weight.dtype)
        return self.fc(x)


def run(block: nn.Module) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return contract.run_block(block, torch.ones(2, 3), checkpointed=False)


def test_weights_are_back_in_place_even_after_an_error(together: None) -> None:
    block = Block()
    run(block)
    assert block.seen == [torch.bfloat16] and isinstance(block.fc.weight, nn.Parameter)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="mat1 and mat2"):
        contract.run_block(block, torch.ones(2, 5), checkpointed=False)
    assert isinstance(block.fc.weight, nn.Parameter) and "weight" not in vars(block.fc)


def test_frozen_weights_get_no_gradient(together: None) -> None:
    block = Block()
    block.fc.bias.requires_grad_(False)
    run(block).sum().backward()
    assert block.fc.bias.grad is None and block.fc.weight.grad is not None


def test_nothing_is_cast_without_autocast(together: None) -> None:
    block = Block()
    contract.run_block(block, torch.ones(2, 3), checkpointed=False)
    assert block.seen == [torch.float32]


def test_what_hooks_or_parametrisations_may_exchange_is_left_alone(together: None) -> None:
    block = Block()
    block.fc.register_forward_pre_hook(lambda module, args: None)
    run(block)
    assert block.seen == [torch.float32]
    block = Block()
    nn.utils.parametrizations.weight_norm(block.fc)
    run(block).sum().backward()
    assert block.seen == [torch.float32]
    assert all(x.grad is not None for x in block.fc.parametrizations.parameters())


def test_gradients_can_be_differentiated_again(together: None) -> None:
    block = Block()
    (grad,) = torch.autograd.grad(run(block).float().square().sum(), block.fc.weight, create_graph=True)
    assert grad.requires_grad and torch.autograd.grad(grad.sum(), block.fc.weight)[0].abs().sum() > 0


class Run(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return contract.run_block(self.block, x, checkpointed=False)


def test_parameters_of_functional_call_are_cast_unless_a_transform_follows_them(together: None) -> None:
    block = Block()
    values = {name: x.detach().clone().requires_grad_() for name, x in block.named_parameters()}

    def call(values: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.func.functional_call(Run(block), values, (torch.ones(2, 3),)).float().sum()

    values = {f"block.{name}": x for name, x in values.items()}
    call(values).backward()
    assert block.seen.pop() == torch.bfloat16
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in values.values())
    found = torch.func.grad(call)({name: x.detach() for name, x in values.items()})
    assert block.seen.pop() == torch.float32
    for name, x in values.items():
        torch.testing.assert_close(found[name], x.grad, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_without_gradients_a_model_is_cast_once(together: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = create_shallow("vim_tiny").eval()
    calls = []
    cast = half_weights.casts
    monkeypatch.setattr(
        half_weights, "casts", lambda weights, dtype: calls.append(len(weights)) or cast(weights, dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images(1, 3, 64, 64))
        assert len(calls) == 1 and calls[0] > 4 * len(model.blocks)
        monkeypatch.setattr(half_weights, "_DEVICE", "cuda")
        torch.testing.assert_close(found, model(images(1, 3, 64, 64)), rtol=2e-2, atol=2e-2)
