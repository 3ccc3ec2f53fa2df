"""Kernels for graphics cards: whether this localr1 has them, can compile them, and has."""

import os
from dataclasses import dataclass
from pathlib import Path

from localr1.doctor.finding import Finding
from localr1.errors import KernelError


@dataclass(frozen=True)
class KernelCacheFacts:
    """exists: whether this localr1 has kernels for cards at all. compiler: NVRTC's version; ""
    with a problem that says why there is none. compiled: how many are kept, nbytes: in how much."""

    exists: bool
    compiler: str = ""
    problem: str = ""
    compiled: int = 0
    nbytes: int = 0


def read_kernel_cache(cache_dir: Path) -> KernelCacheFacts:
    version = _compiler_version()
    if version is None:
        return KernelCacheFacts(exists=False)
    compiler, problem = version
    sizes = [
        (Path(folder) / name).stat().st_size
        for folder, _, names in os.walk(cache_dir)
        for name in names
        if name.endswith(".cubin")
    ]
    return KernelCacheFacts(True, compiler, problem, len(sizes), sum(sizes))


def _compiler_version() -> tuple[str, str] | None:
    """(NVRTC's version, why there is none); None where this localr1 has no kernels for cards."""
    import importlib

    try:
        program = importlib.import_module("localr1.kernels.gpu_program")
    except ImportError:
        return None
    try:
        return str(program.compiler_version()), ""
    except KernelError as error:
        return "", str(error)


def kernel_cache_findings(facts: KernelCacheFacts) -> tuple[Finding, ...]:
    if not facts.exists:
        return (Finding("compiled kernels", "none: this localr1 has no kernels for cards"),)
    if facts.problem:
        # What keeps the card from being used is said where it is said that it is not.
        return (Finding("compiled kernels", "none: no compiler for them is installed"),)
    kept = "none yet"
    if facts.compiled:
        kept = f"{facts.compiled} kept, {facts.nbytes / (1 << 20):.1f} MiB"
    return (Finding("compiled kernels", f"{kept}; compiler: NVRTC {facts.compiler}"),)
