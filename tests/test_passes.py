"""What is recorded of both passes of a function does what autograd does: on a GPU, else in Triton's interpreter."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import ref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from backbones.layers import MambaBlock, NonCausalSSD, PositionalBlock, Scan, recorded, set_backend
from backbones.layers.half_weights import cast_their_own
from backbones.layers.mamba2 import Mamba2Mixer
from backbones.layers.ss2d import SS2D
from backbones.models.adventurer import AdventurerBlock
from backbones.models.efficientvmamba import EVSSBlock, InvertedResidual
from backbones.models.plainmamba import PlainMambaMixer
from backbones.models.vssd import SoftmaxAttention
from backbones.ops import layer_norm
from backbones.patterns import ATROUS, FORWARD
from tests.kernels import DEVICE, RUNS, launch_by_the_library, needs_kernels, quiet
from tests.scripts import run_in_the_interpreter

pytest.importorskip("triton")
from backbones.ops.passes import Passes, _Pair

pytestmark = quiet

C = 6
CALLS = 5  # the third is recorded


@pytest.fixture
def _by_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    launch_by_the_library(monkeypatch)


@pytest.mark.skipif(RUNS, reason="the kernels run in this process")
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


class Part(nn.Module):
    """Has a bit of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(C)
        self.fc = nn.Linear(C, 2 * C)
        self.conv = nn.Conv2d(2 * C, C, 3, padding=1)
        self.batch_norm = nn.BatchNorm2d(C)
        self.scale = nn.Parameter(torch.rand(C))
        self.unused = nn.Parameter(torch.rand(C))
        self.frozen = nn.Parameter(torch.rand(C), requires_grad=False)
        self.register_buffer("table", torch.randperm(6))

    def forward(self, x: Tensor, pending: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Maps (b, 2, 3, c)."""
        x = x + pending
        y = layer_norm(x, self.norm.weight, self.norm.bias, 1e-5, backend="triton")
        y = F.silu(self.fc(y)).flatten(1, 2)[:, self.table].unflatten(1, (2, 3))
        y = self.batch_norm(self.conv(y.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        kept = y.new_empty(y.shape[0], 1, 1, 1).bernoulli_(0.5)
        return x, None, F.gelu(y * kept) * self.scale * self.frozen + x[:, :1]


def weights(part: nn.Module) -> list[Tensor]:
    return [*part.parameters(), *part.buffers()]


def inputs(call: int) -> list[Tensor]:
    torch.manual_seed(100 + call)
    return [torch.randn(2, 2, 3, C, device=DEVICE) for _ in range(4)]


def step(call: Callable[..., Any], part: nn.Module, number: int) -> list[Any]:
    """Results and all gradients."""
    x, pending, *grads = inputs(number)
    x.requires_grad_(), pending.requires_grad_()
    for weight in part.parameters():
        weight.grad = None
    torch.manual_seed(number)
    stream, nothing, y = call(x, pending)
    assert nothing is None
    torch.autograd.backward([stream, y], grads)
    return [stream.detach(), y.detach(), x.grad, pending.grad, *[weight.grad for weight in part.parameters()]]


def same(found: list[Any], wanted: list[Any]) -> bool:
    pairs = list(zip(found, wanted, strict=True))
    assert all(a is None or (a.dtype, a.shape) == (b.dtype, b.shape) for a, b in pairs if b is not None)
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


def both() -> tuple[nn.Module, nn.Module, Passes, Callable[..., Any]]:
    """A part, another that is the same, recordings, and a call of the former by these."""
    torch.manual_seed(0)
    part = Part().to(DEVICE)
    passes = Passes("selective_scan")
    return part, copy.deepcopy(part), passes, lambda *args: passes.call(part, args, weights(part))


def pairs(passes: Passes) -> list[_Pair]:
    return [x for x in passes._kinds.values() if isinstance(x, _Pair)]


@pytest.fixture
def _deterministic() -> Any:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@needs_kernels
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("library", [False, True], ids=["by Python", "by the library"])
def test_both_passes_are_those_of_autograd(autocast: bool, library: bool, request: pytest.FixtureRequest) -> None:
    if library:
        request.getfixturevalue("_by_the_library")
    part, other, passes, call = both()
    for number in range(CALLS):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            assert same(step(call, part, number), step(other, other, number))
    assert len(pairs(passes)) == 1
    assert same(weights(part), weights(other))  # statistics as well
    for module in (part, other):
        module.eval()
    with torch.no_grad():
        for number in range(CALLS):
            x, pending, *_ = inputs(number)
            torch.manual_seed(number)
            found = passes.call(part, [x, pending], weights(part), "eval")
            torch.manual_seed(number)
            assert same(list(found), list(other(x, pending)))
    assert [callable(program) for program in passes._recordings._kinds.values()] == [True]


@needs_kernels
@pytest.mark.usefixtures("_deterministic", "_by_the_library")
def test_several_calls_before_their_backward_passes() -> None:
    part, other, passes, call = both()
    for number in range(CALLS):
        found = []
        for module, function in ((part, call), (other, other)):
            for weight in module.parameters():
                weight.grad = None
            torch.manual_seed(number)
            losses = []
            for again in range(2):
                x, pending, grad, _ = inputs(10 * number + again)
                stream, _, y = function(x, pending)  # which need no gradients
                losses.append((y * grad).sum() + stream.requires_grad)
            losses[1].backward(retain_graph=True)
            losses[0].backward()
            losses[1].backward()  # once more
            found.append([weight.grad for weight in module.parameters()])
        assert same(*found)
    assert len(pairs(passes)) == 1


@needs_kernels
@pytest.mark.usefixtures("_deterministic", "_by_the_library")
def test_gradients_of_any_layout_and_of_one_result() -> None:
    part, other, passes, call = both()
    for number in range(CALLS):
        found = []
        for module, function in ((part, call), (other, other)):
            x, pending, grad, _ = inputs(number)
            x.requires_grad_()
            torch.manual_seed(number)
            stream, _, y = function(x, pending)
            if number % 2:
                found.append(list(torch.autograd.grad(y.sum(), [x, module.scale])))
            else:
                grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
                found.append(list(torch.autograd.grad([stream, y], [x, module.scale], [grad, grad])))
        for a, b in zip(*found, strict=True):  # sums follow the layout
            torch.testing.assert_close(a, b)
    assert len(pairs(passes)) == 1


@needs_kernels
@pytest.mark.usefixtures("_by_the_library")
def test_gradients_that_are_added_to() -> None:
    part, other, _, call = both()
    for number in range(CALLS):
        found = []
        for module, function in ((part, call), (other, other)):
            x, pending, *grads = inputs(number)
            x.requires_grad_(), pending.requires_grad_()
            for _ in range(2):  # the second time to what the first one left
                torch.manual_seed(number)
                stream, _, y = function(x, pending)
                torch.autograd.backward([stream, y], grads)
            found.append([x.grad, pending.grad, module.fc.weight.grad])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


@needs_kernels
def test_second_derivatives_are_refused() -> None:
    _, _, passes, call = both()
    for _ in range(CALLS):
        x, pending, *_ = inputs(0)
        call(x.requires_grad_(), pending)[2].sum().backward()
    assert pairs(passes)
    y = call(x, pending)[2]
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@needs_kernels
def test_what_launches_nothing_is_differentiated_twice() -> None:
    passes = Passes("selective_scan")
    for _ in range(CALLS):
        x = torch.randn(3, device=DEVICE, requires_grad=True)
        (y,) = passes.call(lambda x: (x**3,), [x], [])
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        torch.testing.assert_close(torch.autograd.grad(grad.sum(), x)[0], 6 * x)
    assert not pairs(passes)


@needs_kernels
@pytest.mark.parametrize("what", ["number", "shape", "constant"])
def test_what_another_call_may_do_otherwise_is_not_recorded(what: str) -> None:
    part, _, passes, _ = both()
    factor = torch.ones(1, device=DEVICE)

    def function(x: Tensor) -> tuple[Tensor]:
        y = layer_norm(x, part.norm.weight, part.norm.bias, 1e-5, backend="triton")
        if what == "number":
            return (y * x.sum().item(),)
        return (y[y > 0] if what == "shape" else y * factor,)

    for number in range(CALLS):
        factor.fill_(number)
        x = inputs(number)[0].requires_grad_()
        wanted = function(x)[0]
        (found,) = passes.call(function, [x], [part.norm.weight, part.norm.bias])
        assert torch.equal(found, wanted)
        assert torch.equal(*[torch.autograd.grad(y.sum(), x)[0] for y in (found, wanted)])
        with torch.no_grad():
            assert torch.equal(passes.call(function, [x], [])[0], function(x)[0])
    assert not pairs(passes) and not any(map(callable, passes._recordings._kinds.values()))


@needs_kernels
def test_gradients_of_what_is_no_weight() -> None:
    part, _, passes, _ = both()
    other = torch.ones(C, device=DEVICE, requires_grad=True)

    def function(x: Tensor) -> tuple[Tensor]:
        return (layer_norm(x, part.norm.weight, part.norm.bias, 1e-5, backend="triton") * other,)

    for number in range(CALLS):
        (y,) = passes.call(function, [inputs(number)[0].requires_grad_()], [part.norm.weight, part.norm.bias])
        assert torch.autograd.grad(y.sum(), other)[0] is not None
    assert not pairs(passes)


@needs_kernels
def test_what_is_needed_of_weights_may_not_change_in_between() -> None:
    part, _, passes, call = both()
    for number in range(CALLS):
        x, pending, *_ = inputs(number)
        y = call(x.requires_grad_(), pending)[2]
        if number == CALLS - 1:
            with torch.no_grad():
                part.scale.add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
        else:
            y.sum().backward()
    assert pairs(passes)


@needs_kernels
def test_calls_without_a_backward_pass_are_not_recorded_for_ever() -> None:
    _, _, passes, call = both()
    for _ in range(10):
        call(*inputs(0)[:2])
    assert [*passes._kinds.values()] == [None]


@needs_kernels
def test_hooks_on_weights_see_a_gradient_once() -> None:
    part, _, passes, call = both()
    seen: list[Tensor] = []
    handle = part.scale.register_hook(seen.append)
    for number in range(CALLS):
        call(*inputs(number)[:2])[2].sum().backward()
        assert len(seen) == number + 1
    assert not pairs(passes)
    handle.remove()
    for number in range(CALLS):
        call(*inputs(number)[:2])[2].sum().backward()
    part.scale.register_hook(seen.append)
    call(*inputs(number)[:2])[2].sum().backward()
    assert pairs(passes) and len(seen) == CALLS + 1


@needs_kernels
def test_nothing_is_kept_alive() -> None:
    part, _, passes, call = both()
    seen: list[Any] = []
    handle = part.fc.register_forward_hook(lambda module, args, y: seen.append(ref(y)))
    for _ in range(CALLS):
        x, pending, *_ = inputs(0)
        stream, nothing, y = call(x.requires_grad_(), pending)
        y.sum().backward()
        assert all(each() is None for each in seen)  # though the results are there still
    handle.remove()
    seen = [ref(t) for t in (stream, y, x, part)]
    del stream, nothing, y, x, pending, part, call, _
    assert pairs(passes) and [each() for each in seen] == [None] * 4


DIM = 8
BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[Any, ...]]] = {
    "spatialmamba": (partial(PositionalBlock, DIM, drop_path=0.5), (1, 2, 3, DIM), ()),
    "vssd": (partial(PositionalBlock, DIM, partial(NonCausalSSD, num_heads=2, d_state=4)), (1, 2, 3, DIM), ()),
    "vssd, attention": (partial(PositionalBlock, DIM, partial(SoftmaxAttention, num_heads=2)), (2, 1, 3, DIM), ()),
    "efficientvmamba": (
        partial(EVSSBlock, DIM, partial(SS2D, scan=Scan(ATROUS), d_state=2), drop_path=0.5), (1, 2, 3, DIM), (),
    ),
    "efficientvmamba, convolutions": (partial(InvertedResidual, DIM), (2, 3, 5, DIM), ()),
    "plainmamba": (
        partial(MambaBlock, DIM, partial(PlainMambaMixer, scan=Scan(FORWARD), d_state=2)), (1, 6, DIM), ((2, 3),),
    ),
    "adventurer": (
        partial(AdventurerBlock, 64, partial(Mamba2Mixer, scan=Scan(FORWARD), d_state=8)), (1, 7, 64), ((2, 3),),
    ),
}  # fmt: skip


def block_and_step(name: str) -> tuple[nn.Module, Callable[..., list[Any]]]:
    make, shape, rest = BLOCKS[name]
    torch.manual_seed(0)
    block = make().to(DEVICE).train()
    set_backend(block, "triton")

    def run(block: nn.Module, number: int, is_recorded: bool) -> list[Any]:
        torch.manual_seed(number)
        x = torch.randn(shape, device=DEVICE, requires_grad=True)
        block.zero_grad()
        y = recorded.run_recorded(block, block, x, *rest) if is_recorded else block(x, *rest)
        y.square().sum().backward()
        return [y.detach(), x.grad, *[p.grad for p in block.parameters()]]

    return block, run


@needs_kernels
@pytest.mark.filterwarnings("ignore:.*determinis")  # of attention
@pytest.mark.usefixtures("_deterministic", "_by_the_library")
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str) -> None:
    block, run = block_and_step(name)
    other = copy.deepcopy(block)
    for number in range(4):
        assert same(run(block, number, True), run(other, number, False))
    assert same([*block.buffers()], [*other.buffers()])
    # Without kernels, second derivatives remain.
    launches = DEVICE == "cuda" or name != "efficientvmamba, convolutions"
    assert len(pairs(recorded._known[block][True].passes)) == launches
    assert block in cast_their_own


@needs_kernels
@pytest.mark.usefixtures("_deterministic")
def test_a_block_that_changes() -> None:
    block, run = block_and_step("vssd")
    other = copy.deepcopy(block)
    calls = []

    def check(numbers: range, records: bool = True) -> None:
        for number in numbers:
            assert same(run(block, number, True), run(other, number, False))
        known = recorded._known[block][True]
        assert known.fits == records and len(pairs(known.passes)) == records

    check(range(4))
    for each in (block, other):
        each.norm1.eps = 0.5
    check(range(4))
    for each in (block, other):
        each.eval()
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(1, 2, 2, DIM, device=DEVICE)
            assert torch.equal(recorded.run_recorded(block, block, x), other(x))
    for each in (block, other):
        each.train()
    check(range(1))  # by the recording that there was
    handles = [each.norm1.register_forward_hook(lambda *args: calls.append(args)) for each in (block, other)]
    check(range(4), records=False)
    assert len(calls) == 8
    for handle in handles:
        handle.remove()
    for each in (block, other):
        each.norm2.weight = each.norm1.weight  # one tensor in two places
    check(range(4), records=False)


@needs_kernels
@pytest.mark.usefixtures("_deterministic")
def test_checkpoints_run_the_block_as_it_is() -> None:
    block, run = block_and_step("vssd")
    for number in range(4):
        wanted = run(block, number, True)
    for reentrant in (False, True):
        for _ in range(4):
            torch.manual_seed(number)
            x = torch.randn(BLOCKS["vssd"][1], device=DEVICE, requires_grad=True)
            block.zero_grad()
            y = checkpoint(recorded.run_recorded, block, block, x, use_reentrant=reentrant)
            y.square().sum().backward()
            assert same([y.detach(), x.grad, *[p.grad for p in block.parameters()]], wanted)


@needs_kernels
def test_attention_asks_again_which_kernels_are_allowed() -> None:
    block, run = block_and_step("vssd, attention")
    for number in range(4):
        run(block, number, True)
    with sdpa_kernel(SDPBackend.MATH):
        for number in range(4):
            run(block, number, True)
    passes = recorded._known[block][True].passes
    first, second = pairs(passes)
    assert ("softmax" in str(second.forward.__kwdefaults__)) > ("softmax" in str(first.forward.__kwdefaults__))
