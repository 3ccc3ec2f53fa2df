"""Strict mypy over every file, seen under the names they are installed by.

quant/ and cli/ become localr1.quant and localr1.cli only when installed, so mypy run in the root
would see a third of the program as strangers. It runs instead in build/typecheck, a tree of links
(copies where links need a privilege, as on Windows) laid out like the installed package.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "typecheck"
# Where each top-level folder of the repository is seen from.
INSIDE_PACKAGE = ("quant", "cli")
BESIDE_PACKAGE = ("tests", "benchmarks", "scripts", "examples")


def link(source: Path, target: Path) -> None:
    if os.name == "nt":
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)
    else:
        target.symlink_to(source)


def build_tree() -> None:
    """Made anew each time but for mypy's cache, so that a file that is gone is gone."""
    package = TREE / "localr1"
    for old in (package, *(TREE / name for name in BESIDE_PACKAGE)):
        if old.is_symlink():
            old.unlink()
        elif old.is_dir():
            shutil.rmtree(old)
    package.mkdir(parents=True)
    for entry in (ROOT / "localr1").iterdir():
        if entry.name != "__pycache__":
            link(entry, package / entry.name)
    for name in INSIDE_PACKAGE:
        link(ROOT / name, package / name)
    for name in BESIDE_PACKAGE:
        link(ROOT / name, TREE / name)


def main() -> int:
    build_tree()
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--explicit-package-bases", "localr1", *BESIDE_PACKAGE, *sys.argv[1:]]
    # Tests import their helpers by bare names, as pytest puts their folder on the path; an
    # example's files import each other as a script's do.
    folders = (
        TREE / "tests",
        TREE / "examples" / "r1_nano",
        TREE / "benchmarks",
        TREE / "scripts",
    )
    environment = {**os.environ, "MYPYPATH": os.pathsep.join(map(str, folders))}
    result = subprocess.run(command, cwd=TREE, stdout=subprocess.PIPE, text=True, env=environment)
    # A message should name the file as it lies in the repository.
    inside = "|".join(INSIDE_PACKAGE)
    print(re.sub(rf"(?m)^localr1[\\/]({inside})\b", r"\1", result.stdout), end="")
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
