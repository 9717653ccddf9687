"""Fixtures that several test files share."""

import pytest
import torch

from backbones import ops


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def available_backends() -> list[str]:
    """Backends that run on this machine's CPU; the Triton interpreter has tests of its own."""
    return [name for name, reason in ops.backends().items() if reason is None and name != "triton"]


@pytest.fixture(params=available_backends())
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs here."""
    return request.param
