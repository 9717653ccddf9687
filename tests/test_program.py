"""Programs of the compiled library do what the calls do of which they are recordings."""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backbones import doctor
from backbones.ops import native
from tests.kernels import DEVICE

pytest.importorskip("triton")
from backbones.ops import program as programs
from backbones.ops.program import Instruction, Place, Program, Writer, shared_memory
from backbones.ops.recorded import Recordings
from backbones.ops.source import Packed
from backbones.ops.triton_host import Enqueued

HOST = native.host(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE))
pytestmark = pytest.mark.skipif(isinstance(HOST, str), reason=str(HOST))
CALLS = 5  # the third is recorded


def block(tensors: list[Any]) -> tuple[Any, ...]:
    x, weight, bias, more = tensors
    h = torch.addmm(bias, x, weight.t())
    y = F.gelu(h)
    z = torch.mm(y, weight)
    wide = torch.cat((z, x), 1)
    return y.view(2, 3, 4), wide[:, 1:].contiguous().sum(0), torch.mm(h.t(), x), more * z


def gradients(tensors: list[Any]) -> tuple[Any, ...]:
    x, weight, bias, _ = tensors
    h = torch.mm(x, weight.t())
    sums = torch.zeros(3, 4, device=x.device)
    total = torch.baddbmm(sums.unsqueeze(0), weight.t().unsqueeze(0), bias.view(1, 1, -1).expand(1, 4, 4), alpha=0.5)
    into, square = torch.empty_like(sums), x.new_empty(1, 3, 3)
    torch.bmm(weight.t().unsqueeze(0), weight.unsqueeze(0), out=square)
    into.copy_(sums.addmm_(x[:3], torch.mm(x.t(), h)))
    back = torch.ops.aten.gelu_backward(h, torch.ops.aten.gelu_backward(h, h), approximate="tanh")
    low = torch.ops.aten.threshold_backward(back, h, 0.25)
    return low.mean((0,), True), back.sum(), total, into, square, x.mean((0, 1), dtype=torch.float64)


def halves(tensors: list[Any]) -> tuple[Any, ...]:
    x, weight, _, _ = tensors
    low = [torch.empty_like(each, dtype=torch.bfloat16) for each in (x, weight)]
    torch._foreach_copy_(low, [x, weight])
    y = torch.mm(low[0], low[1].t())
    kept = x.new_empty(6, 1).bernoulli_(0.5).div_(0.5)
    return y.float() * kept, torch.empty(0, 3, device=x.device), y.view(-1).unbind(0)[5]


def inputs(call: int) -> list[Tensor]:
    torch.manual_seed(call)
    return [torch.randn(shape, device=DEVICE) for shape in ((6, 3), (4, 3), (4,), (6, 3))]


def recording(recordings: Recordings) -> Any:
    (found,) = [x for x in recordings._kinds.values() if callable(x)]
    return found


def run(recordings: Recordings, function: Callable[..., Any], tensors: list[Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return recordings.call(function, tensors)


@pytest.mark.parametrize("function", [block, gradients, halves])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_results_are_those_of_the_calls(function: Callable[..., Any], mode: Any) -> None:
    recordings = Recordings()
    for call in range(CALLS):
        with mode():
            tensors = inputs(call)
            found = run(recordings, function, tensors, call)
            torch.manual_seed(call)
            for a, b in zip(found, function(tensors), strict=True):
                assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype
                assert a.is_inference() == b.is_inference()
    programs = [x for x in recording(recordings).__kwdefaults__.values() if isinstance(x, Program)]
    assert programs, recording(recordings).source


def test_python_makes_what_it_returns_alone() -> None:
    recordings = Recordings()
    with torch.no_grad():
        for call in range(3):
            recordings.call(block, inputs(call))
    lines = recording(recordings).source.splitlines()
    made = [line for line in lines if "dtype=" in line]
    assert sum("memory" in line.split(" = ")[0] for line in made) == 1
    assert len(made) == 1 + 4 + 1  # memory for the rest, results, and what `contiguous` reads
    assert not any("mm" in line or "gelu" in line for line in lines)


def test_random_numbers_are_drawn_in_order_and_once() -> None:
    recordings = Recordings()
    with torch.no_grad():
        for call in range(CALLS):
            x = inputs(0)
            x[0] = torch.cat((x[0].flatten(), x[0].new_zeros(1)))[(1 if call == CALLS - 1 else 0) :][:18].view(6, 3)
            found = run(recordings, halves, x, 7)
            torch.manual_seed(7)
            assert torch.equal(found[0], halves(x)[0])


def test_other_addresses_run_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    recordings, calls = Recordings(), []
    with torch.no_grad():
        for call in range(3):
            recordings.call(block, inputs(call))
        monkeypatch.setattr(Program, "__call__", lambda self, *addresses: calls.append(addresses))
        x, *more = inputs(5)
        odd = torch.cat((x.flatten()[:1], x.flatten()))[1:].view(6, 3)
        for a, b in zip(recordings.call(block, [odd, *more]), block([x, *more]), strict=True):
            assert torch.equal(a, b)
        assert odd.data_ptr() % 16 and not calls
        recordings.call(block, [x, *more])
    assert calls


def test_without_the_library_python_runs_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "host", lambda device: "it is missing")
    recordings = Recordings()
    with torch.no_grad():
        for call in range(CALLS):
            for a, b in zip(recordings.call(block, inputs(call)), block(inputs(call)), strict=True):
                assert torch.equal(a, b)
    assert not any(isinstance(x, Program) for x in recording(recordings).__kwdefaults__.values())


def test_what_fails_is_named() -> None:
    x, y = torch.ones(2, 3, device=DEVICE), torch.ones(2, 3, device=DEVICE)
    writer = Writer(x.device, lambda x: Place.of(x, "", x.data_ptr()))
    for operator in (torch.ops.aten.mm.default, torch.ops.aten.mul.Tensor):
        instruction = writer.operator(operator, (x, y), {}, (torch.empty(5, 5, device=DEVICE)[::2],))
        if operator is torch.ops.aten.mul.Tensor:
            instruction = writer.operator(operator, (x, torch.ones(2, 4, device=DEVICE)), {}, (y,))
        assert instruction is not None
        program = Program([instruction], [], {}, x.device, [])
        with pytest.raises(RuntimeError, match=f"{'mm_out' if 'mm' in str(operator) else 'mul'}.* failed on {DEVICE}"):
            program()


def test_an_exception_is_an_error() -> None:
    x, wrong = torch.ones(2, 3, device=DEVICE), torch.ones(2, 3, dtype=torch.int32, device=DEVICE)
    instruction = Writer(x.device, lambda x: Place.of(x, "", x.data_ptr())).operator(
        torch.ops.aten.gelu.default, (x,), {}, (wrong,)
    )
    assert instruction is not None
    with pytest.raises(RuntimeError, match="gelu failed"):
        Program([instruction], [], {}, x.device, [])()


def test_calls_leave_nothing_behind() -> None:
    class Heap(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in "abcdefghij"]

    heap = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if heap is None:
        pytest.skip("the C library cannot tell how much is in use")
    heap.restype = Heap
    recordings = Recordings()

    def function(tensors: list[Any]) -> tuple[Any, ...]:
        x, weight, bias, _ = tensors
        h = torch.addmm(bias, x, weight.t())
        y = torch.cat((torch.ops.aten.gelu_backward(h, F.gelu(h)), h), 1)
        return torch.mm(y.t(), x), y.sum(0)

    tensors, used, calls = inputs(0), [], 2000
    with torch.no_grad():
        for _ in range(3):
            for _ in range(calls):
                recordings.call(function, tensors)
            used.append(heap().h)  # uordblks
    assert min(used[1] - used[0], used[2] - used[1]) < 8 * calls


def test_launches_are_told_addresses_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE != "cpu":
        pytest.skip("a GPU's driver has a launch of its own")
    seen: list[Any] = []
    kind = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3)

    def launched(*args: Any) -> int:
        parameters = ctypes.cast(args[9], ctypes.POINTER(ctypes.c_void_p))
        x = ctypes.cast(parameters[0], ctypes.POINTER(ctypes.c_uint64))[0]
        number = ctypes.cast(parameters[1], ctypes.POINTER(ctypes.c_int32))[0]
        factor = ctypes.cast(parameters[2], ctypes.POINTER(ctypes.c_float))[0]
        seen.append((args[:9], x, number, factor))
        return 0 if len(seen) == 1 else 700

    function = kind(launched)
    host = native.Host.from_buffer_copy(HOST)  # type: ignore[arg-type]
    host.launch = ctypes.cast(function, ctypes.c_void_p).value
    monkeypatch.setattr(programs.native, "host", lambda device: host)
    monkeypatch.setattr(programs, "current_stream", lambda device: 99)
    x = torch.ones(8)
    bits = [int.from_bytes(bytes(ctypes.c_int64(-3)), "little"), int.from_bytes(bytes(ctypes.c_float(0.5)), "little")]
    writer = Writer(x.device, lambda x: Place.of(x, "x", 12))
    instruction = writer.launch(Enqueued(1234, (5, 6, 7), 128, 4096, (x, *bits)))
    assert instruction is not None
    program = Program([instruction], ["x"], {}, x.device, [])
    program(x.data_ptr())
    assert seen == [((1234, 5, 6, 7, 128, 1, 1, 4096, 99), x.data_ptr() + 12, -3, 0.5)]
    with pytest.raises(RuntimeError, match="a launch failed"):
        program(x.data_ptr())


def test_memory_in_use_at_once_lies_apart() -> None:
    generator = torch.Generator().manual_seed(0)

    def number(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    for _ in range(50):
        sizes = {f"b{i}": number(5000) for i in range(12)}
        touched = [{f"b{number(12)}" for _ in range(3)} for _ in range(10)]
        places = [[Place(name, 0, torch.uint8, (1,), (1,)) for name in sorted(names)] for names in touched]
        begins, total = shared_memory([Instruction("", list(words), frozenset()) for words in places], sizes)
        spans = {name: [i for i, names in enumerate(touched) if name in names] for name in begins}
        assert set(begins) == set().union(*touched)
        assert all(begin % 512 == 0 and begin + sizes[name] <= total for name, begin in begins.items())
        assert total <= sum(-(-sizes[name] // 512) * 512 for name in begins)
        for a in begins:
            for b in begins:
                if a < b and spans[a][0] <= spans[b][-1] and spans[b][0] <= spans[a][-1]:
                    assert begins[a] + sizes[a] <= begins[b] or begins[b] + sizes[b] <= begins[a]


def test_doctor_says_who_runs_them() -> None:
    assert doctor._check_host("it is missing").status == "absent"
    assert "it is missing" in doctor._check_host("it is missing").text
    assert isinstance(HOST, native.Host)
    assert doctor._check_host(HOST).status == "ok"


def test_packed_results_are_those_of_the_calls() -> None:
    def function(tensors: list[Any]) -> tuple[Any, ...]:
        x, weight, bias, _ = tensors
        h = torch.addmm(bias, x, weight.t())
        low = torch.empty_like(h, dtype=torch.bfloat16)
        low.copy_(h)
        y = torch.mm(h, weight)
        return y, None, h, x, None, low.view(2, 12)[:, 3:7], y.view(-1), (h * h).unsqueeze(0), x.new_empty(0, 2)

    recordings = Recordings()
    with torch.no_grad():
        for call in range(CALLS):
            *found, last = recordings.call(function, inputs(call), packs=2)
            wanted = function(inputs(call))
            if call < 3:
                found.append(last)
            else:
                assert isinstance(last, Packed)
                *results, packed = found
                places = [i for i, place in enumerate(last.places) if place is not None]
                assert places == [2, 5, 7, 8]  # not y, which is returned as it is as well
                assert all(results[i] is None for i in places)
                found = last.unpack(results, packed)
            for a, b in zip(found, wanted, strict=True):
                assert a is b is None or (torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype)


def test_nothing_but_empty_tensors_can_be_packed() -> None:
    recordings = Recordings()
    with torch.no_grad():
        for call in range(CALLS):
            x, weight, _, _ = inputs(call)
            found = recordings.call(
                lambda t: (torch.mm(torch.mm(t[0], t[1].t()), t[1]), t[0].new_empty(0, 2)), [x, weight], packs=1
            )
    *results, packed, last = found
    assert [None if x is None else x.shape for x in last.unpack(results, packed)] == [(6, 3), (0, 2)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_linear_layers_are_products_in_every_mode(mode: Any) -> None:
    recordings = Recordings()

    def function(tensors: list[Any]) -> tuple[Any, ...]:
        x, weight, bias, _ = tensors
        return (F.linear(F.linear(x, weight, bias), weight.t()),)

    with mode():
        for call in range(CALLS):
            (found,) = recordings.call(function, inputs(call))
            assert torch.equal(found, function(inputs(call))[0])
    source = recording(recordings).source
    assert source.count(" = c") == 1 + 1, source  # the result, and memory for the rest


def test_results_may_be_constants_and_memory_empty() -> None:
    constant = torch.randn(3, device=DEVICE)

    def function(tensors: list[Any]) -> tuple[Any, ...]:
        x, weight, _, _ = tensors
        none = torch.mm(x.new_zeros(0, 3), weight.t())
        return torch.mm(none.t(), x.new_zeros(0, 3)), constant, None

    for packs in (None, 1):
        recordings = Recordings()
        with torch.no_grad():
            for call in range(CALLS):
                found = recordings.call(function, inputs(call), packs=packs)
                assert torch.equal(found[0], found[0].new_zeros(4, 3)) and found[1] is constant and found[2] is None


def test_what_the_library_cannot_be_told_is_left_to_python() -> None:
    def function(tensors: list[Any]) -> tuple[Any, ...]:
        x, weight, _, _ = tensors
        y = x.new_empty(6, 4)
        y.resize_(6, 4, memory_format=torch.contiguous_format)
        torch.mm(x, weight.t(), out=y)
        return torch.mm(y, weight), y

    recordings = Recordings()
    with torch.no_grad():
        for call in range(CALLS):
            found = recordings.call(function, inputs(call))
            assert all(torch.equal(a, b) for a, b in zip(found, function(inputs(call)), strict=True))
