"""Tools as modules, and tests of Triton kernels in a process of their own."""

import importlib
import os
import subprocess
import sys
from types import ModuleType


def load_tool(name: str) -> ModuleType:
    """The module ``backbones.commands.<name>``, of which optional packages may be missing."""
    return importlib.import_module(f"backbones.commands.{name}")


def call_tool(name: str, *arguments: object) -> None:
    """Calls a command in this process as its script in ``tools/`` does.

    Raises:
        SystemExit: it ended with another status than 0.
    """
    if status := load_tool(name).main([str(x) for x in arguments], f"{name}.py"):
        raise SystemExit(status)


def run_in_the_interpreter(file: str, markers: str = "not slow") -> None:
    """A file's tests in a process with TRITON_INTERPRET=1, which has to be set before Triton is first imported."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-m", markers, file],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
