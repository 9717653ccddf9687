#!/usr/bin/env python
"""Does what ``ssm-backbones export`` does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ssm_backbones import run

if __name__ == "__main__":
    sys.exit(run("export"))
