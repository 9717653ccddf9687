#!/usr/bin/env python
"""The command line of ``backbones.commands.benchmark``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backbones.commands.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
