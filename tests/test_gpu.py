"""Every model on a GPU against the same model on the CPU; skipped where there is none."""

import pytest
import timm
import torch

from tests.test_models import NAMES, create, images
from tests.tolerances import GPU, GPU_AUTOCAST, GROUPMAMBA_GPU_AUTOCAST

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def relative_rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float().cpu() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


@pytest.fixture(autouse=True)
def _exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


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
