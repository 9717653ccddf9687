#!/usr/bin/env python
"""The command line of ``backbones.commands.inference``."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before PyTorch

from backbones.commands.inference import main

if __name__ == "__main__":
    sys.exit(main())
