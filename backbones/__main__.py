"""``python -m backbones COMMAND`` does what ``ssm-backbones COMMAND`` does."""

import os
import sys

from ssm_backbones import COMMANDS, main

if __name__ == "__main__":
    command = COMMANDS.get(" ".join(sys.argv[1:2]))
    if command and command.runs_models and "OMP_WAIT_POLICY" not in os.environ and os.name == "posix":
        # The package is imported before this file, and PyTorch with it: OpenMP has read its settings by now.
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    sys.exit(main(prog="python -m backbones"))
