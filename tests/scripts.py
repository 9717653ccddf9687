"""Tools as modules, and tests of Triton kernels in a process of their own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

_TOOLS = Path(__file__).parents[1] / "tools"


def load_tool(name: str) -> ModuleType:
    """The script ``tools/<name>.py`` as a new module, for tests that run it in this process."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", _TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_in_the_interpreter(file: str, markers: str = "not slow") -> None:
    """A file's tests in a process with TRITON_INTERPRET=1, which has to be set before Triton is first imported."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-m", markers, file],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
