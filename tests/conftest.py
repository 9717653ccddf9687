"""Fixtures that several test files share."""

import sys
from collections.abc import Iterator

import pytest
import torch

from backbones import ops


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_run_remembered() -> Iterator[None]:
    """mmengine keeps loggers and scopes of earlier runs by name; they would reach the next test of this process."""
    yield
    if "mmengine" in sys.modules:
        from mmengine.logging import MessageHub, MMLogger
        from mmengine.registry import DefaultScope

        for logger in MMLogger._instance_dict.values():
            for handler in logger.handlers:
                handler.close()
        for remembered in (MMLogger, MessageHub, DefaultScope):
            remembered._instance_dict.clear()


def available_backends() -> list[str]:
    """Backends that run on this machine's CPU; the Triton interpreter has tests of its own."""
    return [name for name, reason in ops.backends().items() if reason is None and name != "triton"]


@pytest.fixture(params=available_backends())
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs here."""
    return request.param
