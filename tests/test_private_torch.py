"""Private PyTorch is used in `ops/tracing.py` alone, and each of its names still does what is assumed of it there."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._library import simple_registry
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental import symbolic_shapes
from torch.utils.flop_counter import FlopCounterMode

from backbones.ops import tracing

ROOT = Path(__file__).parents[1]
ATTRIBUTES = {  # of tensors, storages and modules
    "_version", "_cdata", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_schema",
    "_registration_handles",
}  # fmt: skip


def is_private(name: str) -> bool:
    """Whether a dotted name of PyTorch, such as ``torch._C``, is without its promise."""
    parts = name.split(".")
    hidden = any(part.startswith("_") and not part.startswith("__") for part in parts)
    return hidden or name.startswith("torch.fx.experimental") or parts[-1] in ATTRIBUTES


def private_names(source: str) -> Iterator[str]:
    """What a module's source uses of private PyTorch."""
    tree = ast.parse(source)
    bound: dict[str, str] = {}  # local names, and what they are in PyTorch
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    bound[alias.asname or "torch"] = alias.name if alias.asname else "torch"
                    yield from [alias.name] if is_private(alias.name) else []
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield from [f"{node.module}.{alias.name}"] if is_private(f"{node.module}.{alias.name}") else []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root: ast.expr = node
            while isinstance(root, ast.Attribute):
                root = root.value
            name = ast.unparse(node)
            if isinstance(root, ast.Name) and root.id in bound:
                name = bound[root.id] + name.removeprefix(root.id)
                yield from [name] if is_private(name) else []
            elif node.attr in ATTRIBUTES:
                yield name


def test_the_search_finds_private_names() -> None:
    source = (
        "import torch\nfrom torch.autograd import forward_ad as ad\nfrom torch.utils._pytree import tree_map\n"
        "import torch._dynamo as d\nx = torch._C.f\ny = ad._level\nz = x._version\nw = torch.nn.Linear.__init__\n"
    )
    found = set(private_names(source))
    assert {"torch.utils._pytree.tree_map", "torch._dynamo", "torch._C.f"} < found
    assert {"torch.autograd.forward_ad._level", "x._version"} < found
    assert not any("Linear" in name for name in found)


def test_only_tracing_uses_private_pytorch() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / "backbones").rglob("*.py")
        if path != Path(tracing.__file__)
        for name in private_names(path.read_text(encoding="utf-8"))
    }
    assert not found, "move to backbones/ops/tracing.py: " + ", ".join(sorted(found))


def test_every_private_name_is_tested_here() -> None:
    used = {name.rpartition(".")[2] for name in private_names(Path(tracing.__file__).read_text(encoding="utf-8"))}
    used -= {"_C", "_functorch", "_python_dispatch", "_pytree", "symbolic_shapes"}  # where they are
    assert used == {name for test in ASSUMED for name in test}


def gpus() -> None:
    if torch.cuda.is_available():
        assert tracing.current_gpu() == torch.cuda.current_device(), "_cuda_getDevice: expected the current GPU"
    else:
        assert hasattr(torch._C, "_cuda_getDevice") == (torch.version.cuda is not None), "_cuda_getDevice: expected one"


def forward_mode() -> None:
    assert forward_ad._current_level == -1, "forward_ad._current_level: expected -1 where no dual level is open"
    with forward_ad.dual_level():
        assert forward_ad._current_level == 0, "forward_ad._current_level: expected 0 in the first dual level"
        x = forward_ad.make_dual(torch.ones(1), torch.ones(1))
        assert tracing.is_transformed(None, x), "a dual tensor is not recognised"
        assert not tracing.is_transformed(torch.ones(1)), "a tensor without tangent is taken for a dual one"


def functorch() -> None:
    peek = torch._C._functorch.peek_interpreter_stack
    assert peek() is None, "peek_interpreter_stack: expected None outside of torch.func"
    seen = []

    def look(x: Tensor) -> Tensor:
        made = torch.empty(0)
        seen.append(
            (
                peek() is not None,
                torch._C._functorch.is_gradtrackingtensor(x),
                torch._C._functorch.is_functorch_wrapped_tensor(made),
                tracing.is_transformed(x),
                tracing.is_traced(),
            )
        )
        with tracing.untraced():
            seen.append(torch._C._functorch.is_functorch_wrapped_tensor(torch.empty(0)))
        return x.sum()

    torch.func.grad(look)(torch.ones(2))
    names = ("peek_interpreter_stack", "is_gradtrackingtensor", "is_functorch_wrapped_tensor")
    for name, right in zip((*names, "is_transformed", "is_traced"), seen[0], strict=True):
        assert right, f"{name}: expected to tell that torch.func.grad follows"
    assert not seen[1], "_DisableFuncTorch: expected plain tensors within"
    assert not tracing.is_transformed(torch.ones(1)) and not tracing.is_traced()


class _HearsLaunches(tracing.TorchDispatchMode):
    hears_launches = True

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return operator(*args, **kwargs or {})


def modes() -> None:
    count = torch._C._len_torch_dispatch_stack
    assert count() == 0, "_len_torch_dispatch_stack: expected 0 outside of modes"
    with FakeTensorMode():
        assert count() == 1, "_len_torch_dispatch_stack: expected to count FakeTensorMode"
        assert tracing.is_traced()
        with tracing.untraced():
            assert type(torch.empty(0)) is Tensor, "_disable_current_modes: expected plain tensors within"
            assert not tracing.is_traced()
        assert count() == 1, "_disable_current_modes: expected the mode back"
    with FlopCounterMode(display=False):
        assert count() == 1 and not tracing.is_traced(), "a mode that only looks on is taken for a tracer"
        assert tracing.is_watched()
        with _HearsLaunches():
            assert count() == 2 and tracing.is_watched()
    with _HearsLaunches() as mode:
        assert torch._C._get_dispatch_stack_at(0) is mode, "_get_dispatch_stack_at: expected the mode"
        assert not tracing.is_watched() and torch.ones(1).item() == 1

    names = []

    class Recorder(tracing.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Recorder():
        torch.ones(1) + 1
    assert "aten.add.Tensor" in names, "TorchDispatchMode: expected to see every operator"


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
def jit_trace() -> None:
    states = []

    def look(x: Tensor) -> Tensor:
        states.append(torch._C._get_tracing_state() is not None)
        with tracing.untraced():
            states.append(torch._C._get_tracing_state() is not None)
            states.append(torch.jit.is_tracing())
            torch.ones(3).sum().item()  # traced, it would be recorded
        states.append(torch._C._get_tracing_state() is not None)
        return x + 1

    program = torch.jit.trace(look, torch.ones(2), check_trace=False)
    assert states == [True, False, False, True], "_set_tracing_state: expected to pause the tracer and to go on"
    assert "aten::sum" not in str(program.graph), "_set_tracing_state: expected nothing to be recorded meanwhile"


def dispatch_keys() -> None:
    library = torch.library.Library("private_torch_test", "DEF")
    library.define("double(Tensor x) -> Tensor")
    op = torch.ops.private_torch_test.double.default
    seen, keysets, redispatched = [], [], []

    def kernel(x: Tensor) -> Tensor:
        seen.append(x.is_neg())
        return x * 2

    def autograd(keys, x):  # type: ignore[no-untyped-def]
        keysets.append(keys & torch._C._after_autograd_keyset)
        return tracing.below_autograd(op, kernel, keys, x)

    class Counter(tracing.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            redispatched.append(func)
            return func(*args)

    library.impl("double", kernel, "CompositeExplicitAutograd")
    library.impl("double", autograd, "Autograd", with_keyset=True)
    y = op(torch.ones(2, requires_grad=True))
    op(torch.ones(2, dtype=torch.complex64).conj().imag)  # negated when it is read
    with Counter():
        op(torch.ones(2))
    library._destroy()
    assert seen == [False] * 3, "redispatch: expected the kernel behind autograd to run once a call, on plain numbers"
    assert keysets[0] == tracing._CPU_ALONE, "DispatchKeySet: expected nothing between autograd and the CPU's kernel"
    assert op in redispatched, "DispatchKeySet: expected a mode to see the operator"
    assert y.tolist() == [2, 2]
    assert not y.requires_grad, "_AutoDispatchBelowAutograd: expected nothing to be recorded below autograd"


def fakes() -> None:
    library = torch.library.Library("private_torch_test", "DEF")
    library.define("triple(Tensor x) -> Tensor")
    handles = len(library._registration_handles)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "getmodule", lambda *args: pytest.fail("register_fake: it looks through all modules"))
        tracing.register_fake(library, "triple")(lambda x: x.new_empty(3 * x.shape[0]))
    assert len(library._registration_handles) == handles + 1, "_registration_handles: expected to keep it"
    assert simple_registry.singleton.find("private_torch_test::triple").fake_impl.kernel is not None
    with FakeTensorMode():
        assert torch.ops.private_torch_test.triple(torch.empty(2)).shape == (6,), "find: expected the operator's entry"
    assert torch.ops.private_torch_test.triple(torch.empty(2, device="meta")).shape == (6,)
    library._destroy()


def symbolic_sides() -> None:
    assert tracing.has_static_value(3), "has_static_value: expected True for a number"
    assert tracing.statically_true(True) and not tracing.statically_true(False)
    seen = []

    class Look(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(
                (
                    symbolic_shapes.has_static_value(x.shape[0]),
                    symbolic_shapes.has_static_value(x.shape[1]),
                    symbolic_shapes.statically_known_true(x.shape[0] >= 1),
                    symbolic_shapes.statically_known_true(x.shape[0] % 2 == 0),
                )
            )
            return x + 1

    batch = torch.export.Dim("batch", min=2)
    torch.export.export(Look(), (torch.ones(4, 3),), dynamic_shapes=({0: batch},), strict=False)
    assert seen[0] == (False, True, True, False), (
        "has_static_value, statically_known_true: expected to know fixed sides and bounds, nothing of a dynamic side"
    )


def hooks() -> None:
    module = nn.Linear(2, 2)
    assert not tracing.is_hooked(module), "_has_any_global_hook: expected none"
    for register in (
        module.register_forward_hook,
        module.register_forward_pre_hook,
        module.register_full_backward_hook,
        module.register_full_backward_pre_hook,
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_full_backward_hook,
    ):
        handle = register(lambda *args: None)
        assert tracing.is_hooked(module), f"{register.__name__}: expected to find its hook"
        assert tracing.is_hooked_everywhere() is tracing.is_as_written(module)
        handle.remove()
        assert not tracing.is_hooked(module), f"{register.__name__}: expected to find it gone"
        assert tracing.is_as_written(module) and not tracing.is_hooked_everywhere()
    handle = module.register_forward_pre_hook(lambda *args: None)
    assert tracing.is_hooked_before(module), "_forward_pre_hooks: expected to hold the hook"
    handle.remove()
    assert not tracing.is_hooked_before(module)
    assert not tracing.is_replaced(module), "_compiled_call_impl: expected none"
    module.compile()
    assert tracing.is_replaced(module), "_compiled_call_impl: expected what compile() made"
    module = nn.Linear(2, 2)
    module.forward = lambda x: x
    assert tracing.is_replaced(module)
    module = nn.Linear(2, 2)
    whole = nn.Sequential(module, nn.Sequential(module, nn.ReLU()))
    whole.register_module("none", None)
    assert set(tracing.all_modules(whole)) == set(whole.modules()), "_modules: expected the modules inside"
    assert tracing.own_weight(module, "weight") is module.weight, "_parameters: expected the parameter"
    assert tracing.Weight.of(module, "none") is None
    weight = tracing.Weight.of(module, "weight")
    assert weight and weight.now() is module.weight and weight.is_plain and weight.dtype == torch.float32
    state = tracing.State(module)
    vars(module)["weight"] = torch.zeros(2, 2)
    assert weight.now() is vars(module)["weight"] and state.holds()
    assert tracing.own_weight(module, "weight") is None and module.weight.sum() == 0, (
        "vars(module): expected to go first"
    )


def norms() -> None:
    batch = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    for norm in (*batch, nn.InstanceNorm2d):
        assert issubclass(norm, tracing.RunningNorm), f"_NormBase: expected to be a base of {norm.__name__}"
        assert issubclass(norm, tracing.BatchNorm) is (norm in batch), f"_BatchNorm: expected no {norm.__name__}"
    assert not issubclass(nn.GroupNorm, tracing.RunningNorm) and not issubclass(nn.LayerNorm, tracing.RunningNorm)


def tensors() -> None:
    leaf = torch.ones(1, requires_grad=True)
    handle = leaf.register_hook(lambda grad: None)
    assert tracing.has_gradient_hooks(leaf), "_backward_hooks: expected those that were registered"
    handle.remove()
    assert not tracing.has_gradient_hooks(leaf) and not tracing.has_gradient_hooks(torch.ones(1))
    x = torch.arange(4)
    before = tracing.identity(x)
    assert before == tracing.identity(x.view(4)), "_cdata: expected one storage of two views"
    assert before != tracing.identity(x[1:]) and before != tracing.identity(x.clone())
    x.add_(1)
    assert before != tracing.identity(x), "_version: expected to count modifications"
    with torch.inference_mode():
        tracing.identity(torch.arange(4))
    assert tracing.storage_of(x) == tracing.storage_of(x[1:]) != tracing.storage_of(x.clone()), "_cdata"
    a, b = tracing.copies([x, x + 1])
    assert a.tolist() == x.tolist() and a.data_ptr() != x.data_ptr() and b.tolist() == (x + 1).tolist(), "_foreach_add"
    a, b = tracing.casts([x, x[::2]], torch.float64)
    assert a.dtype == torch.float64 and b.tolist() == x[::2].tolist(), "_foreach_copy_: expected to convert"
    tree = tracing.tree_map(lambda t: t + 1, {"a": [x, (x,)]})
    assert tree["a"][1][0].tolist() == (x + 1).tolist(), "tree_map: expected to go through dicts, lists and tuples"


def saved_tensor_hooks() -> None:
    assert not tracing.has_saved_tensor_hooks()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert tracing.has_saved_tensor_hooks(), "_top_saved_tensors_default_hooks: expected those that are entered"
        with torch.no_grad():
            assert tracing.has_saved_tensor_hooks()


def operators() -> None:
    numbers = torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default
    assert all(tracing.reads_numbers(operator, ()) for operator in numbers)
    index, places = torch.ops.aten.index.Tensor, torch.tensor([1])
    assert not tracing.reads_numbers(index, (places, [None, places]))
    assert tracing.reads_numbers(index, (places, [places > 0]))
    assert not tracing.reads_numbers(torch.ops.aten.add.Tensor, ())
    aten = torch.ops.aten
    for operator in (aten.add_.Tensor, aten.mm.out, aten._foreach_copy_.default, aten.bernoulli_.float):
        assert tracing.changes_arguments(operator), f"_schema: expected {operator} to be mutable"
    for operator in (aten.add.Tensor, aten.view.default, aten.rand_like.default):
        assert not tracing.changes_arguments(operator), f"_schema: expected {operator} not to be mutable"
    *given, out = tracing.arguments_of(aten.mean.out)
    kinds = [x.type.kind() for x in given]
    assert kinds == ["TensorType", "OptionalType", "BoolType", "OptionalType"], f"_schema: got {kinds}"
    assert given[1].type.getElementType().kind() == "ListType" and given[2].default_value is False
    assert (out.name, out.is_write, given[0].is_write) == ("out", True, False), "_schema: expected what is written"
    assert tracing.returns_of(aten.mean.out) == 1 and tracing.returns_of(aten._foreach_copy_.default) == 0
    assert tracing.is_random(aten.rand_like.default) and not tracing.is_random(aten.empty_like.default)


def states() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    state = tracing.State(module)
    assert state.holds()
    for change in (
        lambda: setattr(module[1], "p", 0.25),
        lambda: module.eval(),
        lambda: module[0].register_forward_hook(lambda *args: None),
        lambda: setattr(module[0], "bias", None),
        lambda: setattr(module[0], "forward", lambda x: x),
        lambda: module.append(nn.ReLU()),
        lambda: setattr(module[1], "__class__", nn.Identity),
        lambda: module[0].compile(),
        lambda: module.append(torch.jit.script(nn.Linear(2, 2))),
        lambda: setattr(module[1], "p", torch.ones(2)),
        lambda: setattr(module[1], "p", torch.ones(2)),
        lambda: setattr(module[1], "p", torch.ones(1)),
        lambda: setattr(module[1], "p", torch.ones(1)),
        lambda: setattr(module[1], "p", None),
        lambda: setattr(module[1], "p", torch.ones(2).numpy()),
        lambda: delattr(module[1], "p"),
        lambda: module[0].register_buffer("scale", None),
        lambda: module[0].register_buffer("scale", torch.ones(1)),
        lambda: module[0].register_buffer("scale", torch.ones(1)),
        lambda: module[0].register_buffer("scale", None),
        lambda: setattr(module[0], "_parameters", dict(module[0]._parameters)),
    ):
        change()
        assert not state.holds(), "nn.Module: expected what it depends on among its attributes"
        state = tracing.State(module)
        assert state.holds()
    for name, value in {"_forward_hooks": print, "_modules": nn.ReLU(), "_buffers": torch.ones(1)}.items():
        setattr(module[0], name, dict(vars(module[0])[name]))  # an equal one, which then changes
        getattr(module[0], name)["other"] = value
        assert not state.holds(), f"{name}: expected the dictionary that a module has now"
        state = tracing.State(module)


ASSUMED = {
    ("_schema",): operators,
    ("_top_saved_tensors_default_hooks", "_autograd"): saved_tensor_hooks,
    (): states,
    ("_current_level",): forward_mode,
    ("peek_interpreter_stack", "is_gradtrackingtensor", "is_functorch_wrapped_tensor", "_DisableFuncTorch"): functorch,
    ("_len_torch_dispatch_stack", "_get_dispatch_stack_at", "TorchDispatchMode", "_disable_current_modes"): modes,
    ("_get_tracing_state", "_set_tracing_state"): jit_trace,
    ("CPU", "DispatchKey", "DispatchKeySet", "_AutoDispatchBelowAutograd", "_after_autograd_keyset"): dispatch_keys,
    ("simple_registry", "find", "singleton", "_registration_handles"): fakes,
    ("statically_known_true",): symbolic_sides,
    ("_cuda_getDevice",): gpus,
    (
        *("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"),
        "_has_any_global_hook",
    ): hooks,
    ("_BatchNorm", "_NormBase"): norms,
    ("_version", "_cdata", "_foreach_add", "_foreach_copy_", "tree_map"): tensors,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("check", ASSUMED.values(), ids=lambda check: check.__name__)
def test_private_names_do_what_is_assumed(check) -> None:  # type: ignore[no-untyped-def]
    assert inspect.isfunction(check)
    check()
