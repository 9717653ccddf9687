"""Every model on a GPU against the same model on the CPU; skipped where there is none."""

import copy
import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
import timm
import torch

import backbones
from tests.small_models import SMALLEST, create, create_shallow, images, total
from tests.test_models import NAMES
from tests.tolerances import GPU, GPU_AUTOCAST, GROUPMAMBA_GPU_AUTOCAST

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def relative_rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float().cpu() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


@pytest.fixture(params=SMALLEST)
def name(request: pytest.FixtureRequest) -> str:
    """One model of every generation of every family."""
    return request.param


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    settings: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]  # which `monkeypatch` cannot set back
    before = [x.allow_tf32 for x in settings]
    for x in settings:
        x.allow_tf32 = False
    yield
    for x, allowed in zip(settings, before, strict=True):
        x.allow_tf32 = allowed


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_logits_agree_with_the_cpu(name: str) -> None:
    model = create(name).eval()
    expected = model(images())
    model.cuda()
    assert relative_rms(model(images().cuda()), expected) <= GPU
    limit = GROUPMAMBA_GPU_AUTOCAST if name.startswith("groupmamba") else GPU_AUTOCAST
    with torch.autocast("cuda", torch.bfloat16):
        assert relative_rms(model(images().cuda()), expected) <= limit


def test_gradients_are_reproducible_when_asked_for() -> None:
    model = create("vmamba_tiny_s1l8").cuda().train()
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            torch.manual_seed(0)
            model.zero_grad()
            model(images().cuda()).square().mean().backward()
            runs.append([p.grad.clone() for p in model.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@torch.no_grad()
def test_a_model_runs_in_a_cuda_graph() -> None:
    model = timm.create_model("vim_tiny", img_size=64, num_classes=10).cuda().eval()
    image = images(1, 3, 64, 64).cuda()
    expected = model(image)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model(image)
    graph.replay()
    torch.testing.assert_close(captured, expected)


def trained(model: torch.nn.Module, image: torch.Tensor, steps: int = 3, accumulate: int = 1) -> list[torch.Tensor]:
    """The parameters after some steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        for _ in range(accumulate):
            total(model(image)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return [x.detach().clone() for x in model.parameters()]


@pytest.mark.filterwarnings("ignore:.*determinis")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_recordings_train_as_autograd_does(name: str, dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = create_shallow(name, drop_path_rate=0.2).cuda().train()
    plain = copy.deepcopy(model)

    def step(model: torch.nn.Module, number: int) -> list[torch.Tensor | None]:
        torch.manual_seed(number)
        model.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            loss = total(model(images(2, 3, 64, 64).cuda()))
        loss.backward()
        return [loss.detach(), *[x.grad for x in model.parameters()], *model.buffers()]

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for number in range(5):
            found = step(model, number)
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):  # blocks run as they are
                wanted = step(plain, number)
            assert all(x is y is None or torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def pair(name: str, **kwargs: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model in training mode, and its copy that replays graphs."""
    torch.manual_seed(0)
    model = create_shallow(name, **kwargs).cuda().train()
    return model, backbones.cuda_graphs(copy.deepcopy(model))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_graphs_train_as_eager_does(name: str, accumulate: int) -> None:
    eager, graphed = pair(name)
    image = images(4, 3, 64, 64).cuda()
    expected, found = (trained(model, image, accumulate=accumulate) for model in (eager, graphed))
    assert graphed.forward.graphs
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=GPU, atol=GPU)
    for x, y in zip(graphed.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(x, y, rtol=GPU, atol=GPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_graphs_follow_autocast(name: str, dtype: torch.dtype) -> None:
    eager, graphed = pair(name)
    image = images(4, 3, 64, 64).cuda()
    with torch.no_grad(), torch.autocast("cuda", dtype):
        expected, found = eager.eval()(image), graphed.eval()(image)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)
    assert len(graphed.forward.graphs) == 1


@torch.no_grad()
def test_outputs_of_a_graph_are_the_callers_own() -> None:
    model = backbones.cuda_graphs(create_shallow("vim_tiny").cuda().eval())
    first, second = images(2, 3, 64, 64).cuda(), 2 * images(2, 3, 64, 64).cuda()
    kept = model(first)
    model(second)
    torch.testing.assert_close(kept, model(first))
    assert not torch.equal(kept, model(second))


@pytest.mark.parametrize("training", [False, True])
def test_another_thread_may_pin_memory_during_a_capture(training: bool) -> None:
    _, model = pair("vim_tiny")
    image, captured = images(2, 3, 64, 64).cuda(), Event()

    def pin() -> list[torch.Tensor]:
        kept = []  # so that every turn allocates anew
        while not captured.is_set() and len(kept) < 1000:
            kept.append(torch.empty(4096 + len(kept)).pin_memory())
        return kept

    with ThreadPoolExecutor(1) as pool:
        pinned = pool.submit(pin)
        try:
            with torch.set_grad_enabled(training):
                model.train(training)(image)
        finally:
            captured.set()
        assert pinned.result()
    assert len(model.forward.graphs) == 1


@torch.no_grad()
def test_features_are_replayed() -> None:
    model = create_shallow("vmamba_tiny_s1l8", features_only=True).cuda().eval()
    image = images(2, 3, 64, 96).cuda()
    expected = model(image)
    for found, wanted in zip(backbones.cuda_graphs(model, image)(image), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_drop_path_is_random_at_every_replay() -> None:
    _, model = pair("vmamba_tiny_s1l8", drop_path_rate=0.5)
    image = images(4, 3, 64, 64).cuda()
    assert len({total(model(image)).item() for _ in range(8)}) > 1


def test_another_shape_runs_eagerly_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    eager, graphed = pair("vim_tiny")
    image = images(4, 3, 64, 64).cuda()
    graphed(image)
    for _ in range(2):
        torch.testing.assert_close(graphed(image[:3]), eager(image[:3]))
    assert len(graphed.forward.graphs) == 1
    assert [x.getMessage() for x in caplog.records] == [
        "Vim runs without its CUDA graph: images are 3 x 3 x 64 x 64 in float32, "
        "the graph is for 4 x 3 x 64 x 64 in float32"
    ]


def test_frozen_parameters_get_no_gradient_after_a_new_capture() -> None:
    _, model = pair("vim_tiny")
    image = images(4, 3, 64, 64).cuda()
    total(model(image)).backward()
    model.zero_grad()
    model.patch_embed.requires_grad_(False)
    total(model(image)).backward()
    assert all(x.grad is None for x in model.patch_embed.parameters())
    assert model.head.weight.grad is not None


def test_no_garbage_is_collected_during_a_capture() -> None:
    _, model = pair("vim_tiny")
    forward, seen = model.norm.forward, []

    def watched(x: torch.Tensor) -> torch.Tensor:
        seen.append((torch.cuda.is_current_stream_capturing(), gc.isenabled()))
        return forward(x)

    model.norm.forward = watched
    model(images(4, 3, 64, 64).cuda())
    assert (True, False) in seen and (True, True) not in seen
    assert gc.isenabled()


def test_backward_of_an_overwritten_pass_is_refused() -> None:
    _, model = pair("vim_tiny")
    image = images(4, 3, 64, 64).cuda()
    loss = total(model(image))
    model(image)
    with pytest.raises(RuntimeError, match="activations are gone"):
        loss.backward()


def test_checkpointing_and_hooks_run_eagerly() -> None:
    _, model = pair("vim_tiny")
    image = images(4, 3, 64, 64).cuda()
    seen: list[object] = []
    handle = model.blocks[0].register_forward_hook(lambda *args: seen.append(args))
    model(image)
    model(image)
    assert len(seen) == 2 and not model.forward.graphs
    handle.remove()
    model.set_grad_checkpointing()
    total(model(image)).backward()
    assert not model.forward.graphs


def test_a_copy_and_a_state_dict_are_the_models_own() -> None:
    eager, graphed = pair("vim_tiny")
    image = images(4, 3, 64, 64).cuda()
    graphed(image)
    assert graphed.state_dict().keys() == eager.state_dict().keys()
    copied = copy.deepcopy(graphed)
    with torch.no_grad():
        copied.head.bias.add_(1)
    torch.testing.assert_close(copied(image), graphed(image) + 1)


def test_histories_of_a_checkpoint_on_a_gpu_are_read() -> None:
    pytest.importorskip("mmengine")
    from mmengine.logging import HistoryBuffer

    from backbones.mm.engine.checkpoints import to_history, to_plain

    plain = {key: x.cuda() for key, x in to_plain(HistoryBuffer([1.0, 2.0], [1, 1])).items()}  # as `--resume` loads it
    assert to_history(plain).data[0].tolist() == [1, 2]
