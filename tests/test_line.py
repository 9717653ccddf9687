"""Residual blocks as one line of steps against their layers in double precision: on a GPU, else in the interpreter."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import pytest
import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backbones.base.chain import run_chain
from backbones.layers import (
    SS2D,
    ConvFFN,
    GroupMambaLayer,
    MambaBlock,
    MambaMixer,
    MultiScaleSS2D,
    Scan,
    VSSBlock,
    half_weights,
    line,
    set_backend,
)
from backbones.layers.line import Line
from backbones.models.groupmamba import GroupMambaBlock
from backbones.ops import native
from backbones.patterns import FORWARD
from tests.kernels import DEVICE, RUNS, error, launch_by_the_library, needs_kernels, quiet
from tests.scripts import run_in_the_interpreter
from tests.tolerances import AUTOCAST, OPERATOR

pytest.importorskip("triton")
from backbones.ops import recorded
from backbones.ops.source import Packed

pytestmark = quiet

DIM = 8
SECOND = partial(VSSBlock, DIM, partial(SS2D, d_state=1, gated=False, conv_bias=False), Mlp)
MULTI_SCALE = partial(VSSBlock, DIM, MultiScaleSS2D, partial(ConvFFN, residual=True))


def group_block(**options: float) -> nn.Module:
    """With an eps without which the mixer's norm would cancel any scale, whose gradient would be rounding alone."""
    block = GroupMambaBlock(16, GroupMambaLayer, **options)
    block.mixer.norm.eps = 1.0
    return block


BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vmamba": (SECOND, (2, 3, 5, DIM)),
    "vmamba, one column": (SECOND, (1, 4, 1, DIM)),
    "vmamba, first generation": (partial(VSSBlock, DIM, partial(SS2D, d_state=3)), (2, 3, 2, DIM)),
    "msvmamba": (MULTI_SCALE, (2, 3, 5, DIM)),
    "msvmamba, one column": (MULTI_SCALE, (1, 4, 1, DIM)),
    "msvmamba, no gate": (
        partial(VSSBlock, DIM, partial(MultiScaleSS2D, gated=False, upsampling="nearest")),
        (2, 4, 2, DIM),
    ),
    "vim": (partial(MambaBlock, DIM, partial(MambaMixer, d_state=3)), (2, 7, DIM)),
    "lbvim": (
        partial(MambaBlock, DIM, partial(MambaMixer, scan=Scan(FORWARD, local_window=3), d_state=3)),
        (2, 7, DIM),
    ),
    "mamba": (partial(MambaBlock, DIM, partial(MambaMixer, scan=Scan(FORWARD), d_state=3)), (2, 7, DIM)),
    "groupmamba": (group_block, (2, 3, 2, 16)),
    "groupmamba, one row": (group_block, (2, 1, 3, 16)),
}


@pytest.fixture(autouse=True, scope="module")
def _autograd_has_a_context() -> None:
    """Autograd's thread calls cuBLAS first here, which warns where nothing has been launched from it before."""
    if DEVICE == "cuda":
        torch.ones(1, device=DEVICE, requires_grad=True).exp().backward()


@pytest.fixture(autouse=True)
def _every_first_call_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "SEEN", 0)


@pytest.mark.skipif(RUNS, reason="the kernels run in this process")
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


def built(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A block on the kernels, its stream and what is pending."""
    make, shape = BLOCKS[name]
    block = make().to(DEVICE)
    with torch.no_grad():
        for parameter in block.parameters():  # or norms would be idle, and channels alike
            parameter.add_(torch.rand_like(parameter) / 4)
    set_backend(block, "triton")
    x, pending = (torch.randn(shape, device=DEVICE) for _ in range(2))
    return block, x, pending


def steps_of(block: nn.Module, x: Tensor, pending: Tensor | None) -> Any:
    return line.steps_of(block, line.kind_of_call(x, pending), x, pending)


def through(block: nn.Module, x: Tensor, pending: Tensor | None) -> tuple[Tensor, Tensor]:
    """Stream and branch behind the block: by its line, if it has one."""
    steps = steps_of(block, x, pending)
    return block.chained(x, pending) if steps is None else steps.run(x, pending)


def gradients(block: nn.Module, x: Tensor, pending: Tensor | None, grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Stream and branch behind the block, the gradients of its inputs, and of its parameters."""
    inputs = [t.detach().requires_grad_() for t in (x, pending) if t is not None]
    found = through(block, inputs[0], None if pending is None else inputs[1])
    parameters = [p for p in block.parameters() if p.requires_grad]
    return [*found, *torch.autograd.grad(found, [*inputs, *parameters], grads)]


def expected(block: nn.Module, x: Tensor, pending: Tensor | None, grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    """`gradients` of plain PyTorch in double precision."""
    block = copy.deepcopy(block).double().cpu()
    set_backend(block, "naive")
    doubles = [None if t is None else t.double().cpu() for t in (x, pending)]
    return [t.detach() for t in gradients(block, *doubles, tuple(g.double().cpu() for g in grads))]


@needs_kernels
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("is_first", [False, True], ids=["", "nothing pending"])
def test_output_and_gradients(name: str, is_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_first:
        launch_by_the_library(monkeypatch)
    block, x, given = built(name)
    pending = None if is_first else given
    assert steps_of(block, x, pending) is not None
    grads = torch.randn_like(x), torch.randn_like(x)
    found = gradients(block, x, pending, grads)
    for a, b in zip(found, expected(block, x, pending, grads), strict=True):
        assert a.dtype == torch.float32
        assert error(a, b) <= 3 * OPERATOR["float32"]  # of some ten operations behind one another
    for _ in range(2):
        again = gradients(block, x, pending, grads)
        assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
        with torch.no_grad():
            again = through(block, x, pending)
        assert all(torch.equal(a, b) for a, b in zip(again, found, strict=False))
    kinds = steps_of(block, x, pending)._recordings._kinds
    packed = [kind for kind in kinds if any(isinstance(each, Packed) for each in kind[1])]
    programs = [program for program in kinds.values() if callable(program)]
    assert len(programs) == 3 and len(kinds) == 3 + len(packed) and len(packed) <= 1
    if DEVICE == "cuda" or not is_first:
        assert len(packed) == 1 or isinstance(native.host(x.device), str)


@needs_kernels
@pytest.mark.parametrize("name", ["vmamba", "vmamba, first generation", "msvmamba", "vim", "groupmamba"])
def test_autocast(name: str) -> None:
    block, x, pending = built(name)
    grads = torch.randn_like(x), torch.randn_like(x).bfloat16()
    with torch.autocast(DEVICE, torch.bfloat16):
        first = gradients(block, x, pending.bfloat16(), grads)
        for _ in range(2):
            stream, y, dx, dpending, *found = gradients(block, x, pending.bfloat16(), grads)
            with torch.no_grad():
                again = through(block, x, pending.bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(first, (stream, y, dx, dpending, *found), strict=True))
    assert [t.dtype for t in (stream, y, dx, dpending)] == [torch.float32, torch.bfloat16] * 2
    assert all(t.dtype == torch.float32 for t in found)
    assert torch.equal(again[0], stream) and torch.equal(again[1], y)
    wanted = expected(block, x, pending.bfloat16(), grads)
    for a, b in zip((stream, y, dx, dpending), wanted, strict=False):
        assert error(a, b) <= AUTOCAST["bfloat16"]
    # Those of the step sizes alone are small differences of large numbers.
    all_found, all_wanted = (torch.cat([t.flatten() for t in tensors]) for tensors in (found, wanted[4:]))
    assert error(all_found, all_wanted) <= AUTOCAST["bfloat16"]


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("name", ["vmamba", "vim", "groupmamba"])
def test_a_model_leaves_casts_to_blocks_that_run_as_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_weights, "_DEVICE", DEVICE)
    block, x, pending = built(name)
    linear = next(module for module in block.modules() if isinstance(module, nn.Linear))
    model = nn.ModuleList([block, nn.Linear(2, 2, device=DEVICE)])
    seen = []

    def forward() -> tuple[Tensor, ...]:
        seen.append((linear.weight.dtype, model[1].weight.dtype))
        return through(block, x, pending.bfloat16())

    with torch.autocast(DEVICE, torch.bfloat16):
        first, *results = [half_weights.with_half_weights(forward, model) for _ in range(6)]
    assert seen == [(torch.bfloat16, torch.bfloat16), *[(torch.float32, torch.bfloat16)] * 5]
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, first, strict=True))
    linear.register_forward_hook(lambda *args: None)
    with torch.autocast(DEVICE, torch.bfloat16):
        for _ in range(2):
            half_weights.with_half_weights(forward, model)
    assert seen[-1] == (torch.bfloat16, torch.bfloat16)


@needs_kernels
@pytest.mark.parametrize("name", ["vmamba", "msvmamba", "vim", "groupmamba"])
def test_drop_path_is_drawn_as_without_a_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = BLOCKS[name]
    block = make(drop_path=0.4).to(DEVICE)
    set_backend(block, "triton")
    sides = [2] * (len(shape) - 2)
    x, pending, *grads = (torch.randn(6, *sides, shape[-1], device=DEVICE) for _ in range(4))
    assert steps_of(block, x, pending) is not None
    for _ in range(2):
        torch.manual_seed(3)
        found = gradients(block, x, pending, tuple(grads))
    monkeypatch.setattr(Line, "of", lambda *args: None)
    monkeypatch.setattr("backbones.layers.line._lines", WeakKeyDictionary())
    torch.manual_seed(3)
    wanted = gradients(block, x, pending, tuple(grads))
    assert (wanted[1].flatten(1) == 0).all(1).any()  # some image's branch is dropped
    for a, b in zip(found, wanted, strict=True):
        assert error(a, b.detach().cpu().double()) <= OPERATOR["float32"]


@needs_kernels
def test_training_and_evaluation_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = BLOCKS["vmamba"]
    block = make(drop_path=0.4).to(DEVICE)
    set_backend(block, "triton")
    x, pending, *grads = (torch.randn(shape, device=DEVICE) for _ in range(4))
    asked = []
    line_of = VSSBlock.line
    monkeypatch.setattr(VSSBlock, "line", lambda *args: asked.append(args) or line_of(*args))
    for _ in range(3):
        block.train()
        gradients(block, x, pending, tuple(grads))
        block.eval()
        y = through(block, x, pending)[1]
    assert len(asked) == 2
    block.norm1.eps = 0.5  # which both modes have to see
    assert not torch.equal(through(block, x, pending)[1], y)
    block.train()
    steps_of(block, x, pending)
    assert len(asked) == 4


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hook(block: nn.Module) -> None:
    block.mixer.ssm.register_forward_hook(lambda *args: None)


def replace_layer(block: nn.Module) -> None:
    block.mlp.fc1 = Doubled(DIM, 4 * DIM)


def replace_forward(block: nn.Module) -> None:
    block.norm2.forward = lambda x: x


def other_activation(block: nn.Module) -> None:
    block.mlp.act = nn.GELU(approximate="tanh")


def dropout(block: nn.Module) -> None:
    block.mlp.drop1.p = 0.5


def script(block: nn.Module) -> None:
    block.mlp.act = torch.jit.script(block.mlp.act)


def other_backend(block: nn.Module) -> None:
    block.mixer.out_norm.backend = "naive"


def half(block: nn.Module) -> None:
    block.mlp.half()


@needs_kernels
@pytest.mark.parametrize(
    "change", [hook, replace_layer, replace_forward, other_activation, dropout, script, other_backend, half]
)
def test_what_is_not_as_written_is_called(change: Callable[[nn.Module], None]) -> None:
    block, x, pending = built("vmamba")
    assert steps_of(block, x, pending) is not None
    change(block)
    assert steps_of(block, x, pending) is None


@needs_kernels
@pytest.mark.parametrize(
    "name", ["mixer.se", "mixer.se.fc1", "mixer.ssm_low", "mixer.conv_low", "mixer.out_norm", "mlp", "mlp.dwconv"]
)
def test_hooks_within_two_scales_see_calls(name: str) -> None:
    block, x, pending = built("msvmamba")
    assert steps_of(block, x, pending) is not None
    seen = []
    block.get_submodule(name).register_forward_hook(lambda *args: seen.append(args))
    assert steps_of(block, x, pending) is None
    block.chained(x, pending)
    assert seen


@needs_kernels
def test_a_hook_of_all_modules_sees_calls() -> None:
    block, x, pending = built("vim")
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert steps_of(block, x, pending) is None
    finally:
        handle.remove()
    assert steps_of(block, x, pending) is not None


@needs_kernels
def test_a_model_keeps_what_it_learns() -> None:
    block, x, pending = built("vmamba")
    grads = torch.randn_like(x), torch.randn_like(x)
    whole = dict(zip([n for n, _ in block.named_parameters()], gradients(block, x, pending, grads)[4:], strict=True))
    for name, parameter in block.named_parameters():
        parameter.requires_grad_("norm" in name)
    learning = [name for name, parameter in block.named_parameters() if parameter.requires_grad]
    for name, grad in zip(learning, gradients(block, x, pending, grads)[4:], strict=True):
        assert torch.equal(grad, whole[name])


@needs_kernels
def test_a_chain_runs_lines_and_what_has_none() -> None:
    class Other(VSSBlock):
        def chained(self, x: Tensor, pending: Tensor | None) -> tuple[Tensor, Tensor]:
            x, y = super().chained(x, pending)
            return x[:, 1:], 2 * y[:, 1:]

    make, shape = BLOCKS["vmamba, first generation"]
    blocks = [make().to(DEVICE), make().to(DEVICE), Other(DIM).to(DEVICE), make().to(DEVICE), make().to(DEVICE)]
    for block in blocks:
        set_backend(block, "triton")
    x = torch.randn(shape, device=DEVICE)
    asked = []
    blocks[0].line = lambda *args: asked.append(args) or VSSBlock.line(blocks[0], *args)
    y = sum(run_chain(blocks, x))
    assert len(asked) == 1
    assert [block in half_weights.cast_their_own for block in blocks] == [True, True, False, True, True]
    wanted = x
    for block in blocks:
        wanted = sum(block.chained(wanted, None))
    assert error(y, wanted.detach().cpu().double()) <= OPERATOR["float32"]


@needs_kernels
def test_functional_calls_and_saved_tensors() -> None:
    block, x, pending = built("vmamba")
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = sum(through(block, x, pending))
    assert len(kept) > 20
    doubled = {name: 2 * p for name, p in block.named_parameters()}

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, *inputs: Tensor) -> Tensor:
            return sum(through(self.block, *inputs))

    other = torch.func.functional_call(Caller(), {f"block.{name}": p for name, p in doubled.items()}, (x, pending))
    assert not torch.equal(other, y)
    other.sum().backward()
    assert all(p.grad is not None for p in block.parameters())


@needs_kernels
@pytest.mark.parametrize("library", [False, True])
@pytest.mark.parametrize("seen", [0, 99])
def test_gradients_of_leaves_add_up(library: bool, seen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if library:
        launch_by_the_library(monkeypatch)
    monkeypatch.setattr(recorded, "SEEN", seen)
    block, x, pending = built("vim")
    leaves = [t.requires_grad_() for t in (x, pending)]
    for times in range(1, 4):
        stream, y = through(block, *leaves)
        (stream * y).sum().backward()
        if times == 1:
            once = [t.grad.clone() for t in leaves]
        for leaf, grad in zip(leaves, once, strict=True):
            torch.testing.assert_close(leaf.grad, times * grad)


@needs_kernels
@pytest.mark.parametrize("hooks", ["checkpoint", "save_on_cpu"])
def test_hooks_on_saved_tensors_see_as_many_at_every_call(hooks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_by_the_library(monkeypatch)
    block, x, pending = built("vmamba")
    grads = torch.randn_like(x), torch.randn_like(x)
    wanted = gradients(copy.deepcopy(block), x, pending, grads)
    for _ in range(3):
        if (
            hooks == "checkpoint"
        ):  # which ends with an error where it saves another number of tensors when it runs again
            inputs = [x.detach().requires_grad_(), pending.detach().requires_grad_()]
            found = checkpoint(partial(through, block), *inputs, use_reentrant=False)
            found = [*found, *torch.autograd.grad(found, [*inputs, *block.parameters()], grads)]
        else:
            with torch.autograd.graph.save_on_cpu():
                found = gradients(block, x, pending, grads)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def set_eps(block: nn.Module) -> None:
    block.norm1.eps = 0.5


def set_rate(block: nn.Module) -> None:
    block.drop_path.drop_prob = 1.0


def set_mode(block: nn.Module) -> None:
    block.eval()


def set_parameter(block: nn.Module) -> None:
    block.norm2.weight = nn.Parameter(2 * block.norm2.weight.detach())


def set_data(block: nn.Module) -> None:
    block.norm2.weight.data = 2 * block.norm2.weight.data


def prune(block: nn.Module) -> None:
    """As pruners do: the weights keep their place in memory."""
    block.mlp.fc1.weight.data, block.mlp.fc1.bias.data = block.mlp.fc1.weight.data[:5], block.mlp.fc1.bias.data[:5]
    block.mlp.fc2.weight.data = block.mlp.fc2.weight.data[:, :5].contiguous()


@needs_kernels
@pytest.mark.parametrize("change", [set_eps, set_rate, set_mode, set_parameter, set_data, prune])
def test_a_recorded_block_may_change(change: Callable[[nn.Module], None]) -> None:
    block = SECOND(drop_path=0.2).to(DEVICE)
    set_backend(block, "triton")
    x, pending = (torch.randn(3, 1, 2, DIM, device=DEVICE) for _ in range(2))

    def drawn() -> Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return torch.stack(through(block, x, pending))

    for _ in range(2):
        before = drawn()
    change(block)
    after = drawn()
    assert not torch.equal(after, before)
    wanted = copy.deepcopy(block)
    torch.manual_seed(0)
    with torch.no_grad():
        assert error(after, torch.stack(wanted.chained(x, pending)).cpu().double()) <= OPERATOR["float32"]
    for _ in range(2):
        assert torch.equal(drawn(), after)


@needs_kernels
def test_saved_tensors_may_come_back_with_other_strides() -> None:
    block, x, pending = built("vim")
    grads = torch.randn_like(x), torch.randn_like(x)
    for _ in range(2):
        wanted = gradients(block, x, pending, grads)
    pack = partial(torch.clone, memory_format=torch.contiguous_format)
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            found = gradients(block, x, pending, grads)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@needs_kernels
def test_recordings_end_with_their_block() -> None:
    block, x, pending = built("vmamba")
    grads = torch.randn_like(x), torch.randn_like(x)
    for _ in range(2):
        gradients(block, x, pending, grads)
    gone = ref(block.mlp.fc1.weight)
    copied = copy.deepcopy(block)
    assert pickle.loads(pickle.dumps(block)) is not None
    del block
    assert gone() is None
    assert steps_of(copied, x, pending) is not None


@needs_kernels
def test_misuse_is_refused() -> None:
    block, x, pending = built("vmamba")
    x.requires_grad_()
    y = sum(through(block, x, pending)).square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()
    y = sum(through(block, x, pending)).sum()
    with torch.no_grad():
        block.mixer.in_proj.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with pytest.raises(ValueError, match="x: got shape"):
        steps_of(block, x[..., :4], None)
    with pytest.raises(ValueError, match="OnTokens"):
        steps_of(block, x.flatten(1, 2), None)
