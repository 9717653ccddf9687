#!/usr/bin/env python
"""Look at this installation: python tools/doctor.py does what python -m backbones.doctor does.

This one also answers where the library cannot even be imported.
"""

import sys


def main() -> int:
    """Print the report; 0 if all is well, else 1."""
    try:
        from backbones import doctor
    except (ImportError, RuntimeError) as error:  # torchvision built for another torch raises a RuntimeError
        print(f"problem: the library does not import ({error})")
        print(f"  run: {sys.executable} -m pip install --force-reinstall torch torchvision timm packaging")
        return 1
    return doctor.main()


if __name__ == "__main__":
    sys.exit(main())
