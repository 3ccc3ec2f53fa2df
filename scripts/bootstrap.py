"""The first thing `make` runs: says in one sentence that this Python is too old, else installs.

Written so that any Python parses it, 2.7 included; the installer itself is free to be modern.
"""

import os
import runpy
import sys

OLDEST = (3, 11)

if __name__ == "__main__":
    if sys.version_info[:2] < OLDEST:
        sys.exit(
            "error: localr1 needs Python {}.{} or newer, and {} is Python {}.{}: "
            "name a newer one, as in `make chat PYTHON=python3.12`.".format(
                OLDEST[0],
                OLDEST[1],
                sys.executable or "this",
                sys.version_info[0],
                sys.version_info[1],
            )
        )
    installer = os.path.join(os.path.dirname(os.path.abspath(__file__)), "install.py")
    runpy.run_path(installer, run_name="__main__")
