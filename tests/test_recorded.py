"""Recordings do what their function does, and nothing that another call would do otherwise."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import DEVICE

pytest.importorskip("triton")
from backbones.ops.recorded import Recordings
from backbones.ops.triton_host import Launch, launches

CALLS = 6  # the third is recorded


def products(tensors: list[Any]) -> tuple[Any, ...]:
    x, weight, bias = tensors
    y = torch.mm(x, weight.t())
    z = torch.addmm(bias, x, weight.t())
    return y, z, torch.bmm(y.unsqueeze(0), z.t().unsqueeze(0)), None


def views(tensors: list[Any]) -> tuple[Any, ...]:
    x, weight, _ = tensors
    parts = x.view(-1).view(x.shape).split_with_sizes((1, 2), 1)
    rows = [row.clone() for row in weight.unbind(0)]
    return *parts, torch.cat(rows), parts[1].transpose(0, 1), x.view(x.shape), x


def in_place(tensors: list[Any]) -> tuple[Any, ...]:
    x, weight, bias = tensors
    y = torch.empty_like(x)
    y.copy_(x).mul_(2)
    y.view(-1).add_(1)
    torch.mm(x, weight.t(), out=(product := x.new_empty(x.shape[0], weight.shape[0])))
    unused = product * 3
    unused.add_(1)
    return y, product.add_(bias)


def lists(tensors: list[Any]) -> tuple[Any, ...]:
    halves = [torch.empty_like(x, dtype=torch.bfloat16) for x in tensors]
    torch._foreach_copy_(halves, tensors)
    return *halves, torch.stack([x.sum() for x in tensors])


def random(tensors: list[Any]) -> tuple[Any, ...]:
    kept = tensors[0].new_empty(5, 1).bernoulli_(0.5)
    return tensors[0] * kept, torch.rand_like(kept)


FUNCTIONS = [products, views, in_place, lists, random]


def inputs(call: int) -> list[Tensor]:
    torch.manual_seed(100 + call)
    return [torch.randn(shape, device=DEVICE) for shape in ((5, 3), (4, 3), (4,))]


def program(recordings: Recordings) -> Any:
    (found,) = [x for x in recordings._kinds.values() if callable(x)]
    return found


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_results_are_those_of_the_function(function: Callable[..., Any], mode: Any) -> None:
    recordings, results = Recordings(), []
    for call in range(CALLS):
        tensors = inputs(call)
        with mode():
            torch.manual_seed(call)
            found = recordings.call(function, tensors)
            torch.manual_seed(call)
            wanted = function(tensors)
        for a, b in zip(found, wanted, strict=True):
            assert a is b is None or (torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype)
        results.append(found[0])
    assert program(recordings)
    assert not any(torch.equal(a, b) for a, b in pairwise(results))


def test_the_function_is_not_called_again() -> None:
    recordings, calls = Recordings(), []

    def function(tensors: list[Any], times: int) -> tuple[Any, ...]:
        calls.append(times)
        return (tensors[0] * times,)

    with torch.no_grad():
        for _ in range(CALLS):
            for times in (2, 3):
                x = torch.randn(3)
                assert torch.equal(recordings.call(function, [x], times)[0], x * times)
    assert calls == [2, 3] * 3


def test_other_strides_are_another_kind() -> None:
    recordings = Recordings()
    with torch.no_grad():
        for _ in range(CALLS):
            x = torch.randn(4, 3)
            for given in (x, x.t().contiguous().t(), torch.cat((x, x), 1)[:, :3]):
                (found,) = recordings.call(lambda tensors: (tensors[0].as_strided((2, 2), (3, 1)),), [given])
                assert torch.equal(found, given.as_strided((2, 2), (3, 1)))
    assert len([x for x in recordings._kinds.values() if callable(x)]) == 3


def test_what_was_one_tensor_may_be_two() -> None:
    recordings = Recordings()

    def function(tensors: list[Any]) -> tuple[Any, ...]:
        a, b, c = tensors
        return a + 2 * b, torch.mm(torch.mm(a, b.t()), c)

    with torch.no_grad():
        for call in range(CALLS):
            a, b, c = (torch.randn(3, 3, device=DEVICE) for _ in range(3))
            given = [a, a, a] if call < 3 else [a, b, c]
            for found, wanted in zip(recordings.call(function, given), function(given), strict=True):
                assert torch.equal(found, wanted)
    assert program(recordings)


def test_dead_views_and_what_they_freed_are_gone() -> None:
    recordings = Recordings()

    def function(tensors: list[Any]) -> tuple[Any, ...]:
        x = tensors[0].view(2, 2).view(4).view(2, 2)
        y = x + 1
        return (y.view(4),)

    with torch.no_grad():
        for _ in range(3):
            recordings.call(function, [torch.randn(4)])
    assert program(recordings).source.count("\n") == 5  # the definition, a view, the sum, a view, and the end
    assert program(recordings).source.count("del") == 2


def test_launches_are_recorded_at_the_beginnings_of_views(monkeypatch: pytest.MonkeyPatch) -> None:
    recordings, seen = Recordings(), []
    launch = Launch(None, (1,), (), 1)
    monkeypatch.setattr(Launch, "run", lambda self, *tensors: seen.append(tensors) or tensors[0].view(-1)[0].fill_(7))

    def function(tensors: list[Any]) -> tuple[Any, ...]:
        y = torch.empty_like(tensors[0])
        launch(y.view(4), None, tensors[0].view(2, 2)[1])
        return (y,)

    with torch.no_grad():
        for _ in range(CALLS):
            x = torch.randn(4)
            (y,) = recordings.call(function, [x])
            assert y[0] == 7 and seen[-1][1] is None and torch.equal(seen[-1][2].view(-1), x[2:])
            assert seen[-1][0].data_ptr() == y.data_ptr()
    assert len(seen) == CALLS and launches.listener is None


def test_a_recording_within_a_recording_is_part_of_it() -> None:
    outer, inner = Recordings(), Recordings()

    def function(tensors: list[Any]) -> tuple[Any, ...]:
        return *inner.call(products, tensors), tensors[0] + 1

    with torch.no_grad():
        for call in range(CALLS):
            inner.call(products, inputs(call))  # which records it
        for call in range(CALLS):
            found = outer.call(function, inputs(call))
            for a, b in zip(found, (*products(inputs(call)), inputs(call)[0] + 1), strict=True):
                assert a is b is None or torch.equal(a, b)
    assert program(outer) and program(inner)


def test_what_is_no_tensor_among_results() -> None:
    def function(tensors: list[Any]) -> tuple[Any, ...]:
        x, weight, bias = tensors
        _, dweight, none = torch.ops.aten.convolution_backward(
            x.view(1, 1, 5, 3), x.view(1, 1, 5, 3), weight[:1, :1].view(1, 1, 1, 1), None, [1, 1], [0, 0], [1, 1],
            False, [0, 0], 1, [False, True, False],
        )  # fmt: skip
        assert none is None and torch.promote_types(x.dtype, bias.dtype) == x.dtype
        return dweight, none

    recordings = Recordings()
    with torch.no_grad():
        for call in range(CALLS):
            found = recordings.call(function, inputs(call))
            torch.testing.assert_close(found[0].flatten(), inputs(call)[0].square().sum().view(1))
            assert found[1] is None
    assert program(recordings)


def test_operators_of_others_are_not_recorded() -> None:
    with torch.library._scoped_library("tests_recorded", "FRAGMENT") as library:
        library.define("numbered(Tensor x) -> (Tensor, int)")
        calls: list[Tensor] = []
        library.impl("numbered", lambda x: (x + len(calls), calls.append(x) or len(calls)), "CompositeExplicitAutograd")
        recordings = Recordings()
        with torch.no_grad():
            for call in range(CALLS):
                x = inputs(call)[0]
                (found,) = recordings.call(lambda tensors: torch.ops.tests_recorded.numbered(tensors[0])[:1], [x])
                assert torch.equal(found, x + call)
    assert not any(map(callable, recordings._kinds.values()))


def test_what_reads_numbers_is_not_recorded() -> None:
    recordings = Recordings()
    with torch.no_grad():
        for value in range(CALLS):
            x = torch.full((2,), float(value))
            (found,) = recordings.call(lambda tensors: (tensors[0] * tensors[0].sum().item(),), [x])
            assert torch.equal(found, x * 2 * value)


def test_an_error_leaves_nothing_behind() -> None:
    recordings, calls = Recordings(), []

    def function(tensors: list[Any]) -> tuple[Any, ...]:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return (tensors[0] + 1,)

    with torch.no_grad():
        for call in range(CALLS):
            if call == 2:
                with pytest.raises(RuntimeError, match="out of memory"):
                    recordings.call(function, [torch.ones(2)])
                assert launches.listener is None
            else:
                assert torch.equal(recordings.call(function, [torch.ones(2)])[0], torch.full((2,), 2.0))
    assert len(calls) == 4


@pytest.mark.parametrize("seen", [0, None])
def test_recordings_do_not_pile_up(seen: int | None) -> None:
    recordings = Recordings()
    with torch.no_grad():
        for size in range(1, 60):
            recordings.call(lambda tensors, key: (tensors[0] + key,), [torch.ones(size)], size, seen=seen)
    assert len(recordings._kinds) <= 16


def test_what_writes_to_what_lives_longer_is_not_recorded() -> None:
    recordings, kept = Recordings(), torch.zeros(2)

    def function(tensors: list[Any]) -> tuple[Any, ...]:
        kept.copy_(tensors[0])
        first = kept + 1
        kept.mul_(2)
        return first, kept + 1

    with torch.no_grad():
        for value in range(CALLS):
            found = recordings.call(function, [torch.full((2,), float(value))])
            assert [x[0].item() for x in found] == [value + 1, 2 * value + 1]
    assert not any(map(callable, recordings._kinds.values()))
