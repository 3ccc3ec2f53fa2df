"""The processor: what it can compute with, and which of the kernels' builds that makes."""

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from localr1.cgroup import cpu_quota
from localr1.doctor.commands import Command, run
from localr1.doctor.finding import Finding, Verdict

SHOWN_FEATURES: Final = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512dq",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
)
"""As Linux names them: what a kernel could be written for."""
X86: Final = ("x86_64", "amd64", "i386", "i686")
# IsProcessorFeaturePresent (winnt.h) knows these two of them.
_WINDOWS_FEATURES: Final = {"avx2": 40, "avx512f": 41}
_SYSCTL: Final = ("/usr/sbin/sysctl", "-n")
_MAX_FILE: Final = 1 << 20


@dataclass(frozen=True)
class ProcessorFacts:
    """isas: builds of the kernels that run here, best first; None where the native module cannot be
    loaded. features: None where the system does not say. threads: that localr1 computes with.
    chosen: whether LOCALR1_THREADS says so. quota: processors whose time a container may take."""

    name: str
    architecture: str
    physical: int
    logical: int
    allowed: int
    threads: int
    chosen: bool
    features: tuple[str, ...] | None
    isas: tuple[str, ...] | None
    quota: float | None = None


def read_processor(
    isas: tuple[str, ...] | None,
    default_threads: int | None,
    chosen_threads: int | None,
    root: Path = Path("/"),
    system: str = sys.platform,
    command: Command = run,
) -> ProcessorFacts:
    """isas, default_threads: of the native module; None where it cannot be loaded."""
    import psutil

    logical = os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or logical
    try:
        allowed = len(psutil.Process().cpu_affinity() or ()) or logical
    except AttributeError:  # macOS has no affinity
        allowed = logical
    return ProcessorFacts(
        name=_name(root, system, command),
        architecture=platform.machine(),
        physical=physical,
        logical=logical,
        allowed=allowed,
        threads=chosen_threads or default_threads or min(physical, allowed),
        chosen=chosen_threads is not None,
        features=_features(root, system, command),
        isas=isas,
        quota=cpu_quota(root),
    )


def _lines(root: Path) -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo; nothing on systems without it."""
    try:
        with (root / "proc" / "cpuinfo").open(encoding="utf-8", errors="replace") as file:
            text = file.read(_MAX_FILE)
    except OSError:
        return {}
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


def _name(root: Path, system: str, command: Command) -> str:
    if system == "darwin":
        name = command([*_SYSCTL, "machdep.cpu.brand_string"])
    elif system == "win32":
        name = _windows_name()
    else:
        name = _lines(root).get("model name", "")
    return (name.strip() or platform.processor() or "unknown")[:200]


def _features(root: Path, system: str, command: Command) -> tuple[str, ...] | None:
    if system == "win32":
        return _windows_features()
    if system == "darwin":
        # Fails on Apple's own processors, which all have "asimd".
        text = command([*_SYSCTL, "machdep.cpu.features", "machdep.cpu.leaf7_features"])
        text = text.lower().replace("avx512vnni", "avx512_vnni") or "asimd"
    else:
        fields = _lines(root)
        text = fields.get("flags") or fields.get("Features") or ""
    words = text.split()
    return tuple(name for name in SHOWN_FEATURES if name in words) if words else None


def _windows_name() -> str:
    if sys.platform == "win32":
        import winreg

        try:
            with winreg.OpenKey(
                winreg.HKEY_LOCAL_MACHINE, r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
            ) as key:
                return str(winreg.QueryValueEx(key, "ProcessorNameString")[0])
        except OSError:
            pass
    return ""


def _windows_features() -> tuple[str, ...] | None:
    found: tuple[str, ...] | None = None
    if sys.platform == "win32":
        import ctypes

        present = ctypes.windll.kernel32.IsProcessorFeaturePresent
        found = tuple(name for name, number in _WINDOWS_FEATURES.items() if present(number))
    return found


def processor_findings(facts: ProcessorFacts) -> tuple[Finding, ...]:
    cores = f"{facts.physical} core{'s' if facts.physical > 1 else ''}"
    if facts.logical != facts.physical:
        cores += f", {facts.logical} hardware threads"
    features = "not told by this system"
    if facts.features is not None:
        features = ", ".join(facts.features) or "none that kernels are written for"
    return (
        Finding("processor", f"{facts.name}, {facts.architecture}, {cores}"),
        Finding("features", features),
        _kernels(facts),
        _threads(facts),
    )


def _kernels(facts: ProcessorFacts) -> Finding:
    if facts.isas is None:
        return Finding("kernels", "none", Verdict.NOTE, "the native module cannot be loaded")
    best = facts.isas[0]
    value = f"{best} (of {', '.join(facts.isas)})" if len(facts.isas) > 1 else best
    if best != "generic":
        return Finding("kernels", value)
    if facts.architecture.lower() not in X86:
        return Finding(
            "kernels",
            value,
            Verdict.NOTE,
            f"localr1 has no kernels written for {facts.architecture} yet, so the portable ones "
            "compute, more slowly",
            "choose small models, or a machine with an x86 processor that has AVX2",
        )
    if facts.features is not None and "avx2" in facts.features:
        return Finding(
            "kernels",
            value,
            Verdict.NOTE,
            "the processor has AVX2, but not FMA and F16C beside it or not with the system's "
            "consent, as in some virtual machines, so the portable kernels compute",
            "let the virtual machine pass the host's processor through (QEMU: -cpu host)",
        )
    return Finding(
        "kernels",
        value,
        Verdict.NOTE,
        "this processor does not offer AVX2, so the portable kernels compute, more slowly",
        "choose small models, or, in a virtual machine, let it pass the host's processor through "
        "(QEMU: -cpu host)",
    )


def _threads(facts: ProcessorFacts) -> Finding:
    value = f"{facts.threads}{' (LOCALR1_THREADS)' if facts.chosen else ''}"
    if facts.quota is not None and facts.threads > facts.quota + 0.5:
        wanted = max(int(facts.quota), 1)
        return Finding(
            "threads",
            value,
            Verdict.NOTE,
            f"this container may take the time of {facts.quota:g} processors, and more threads "
            "than that wait for each other",
            f"set LOCALR1_THREADS={wanted}, or raise the limit (docker run --cpus)",
        )
    most = min(facts.physical, facts.allowed)
    if facts.threads > most:
        return Finding(
            "threads",
            value,
            Verdict.NOTE,
            f"there are {most} cores for them, and threads that share one wait for each other",
            f"set LOCALR1_THREADS={most}, or unset it",
        )
    if facts.chosen and facts.threads < most:
        return Finding(
            "threads",
            value,
            Verdict.NOTE,
            f"{most - facts.threads} of {most} cores stay idle",
            "unset LOCALR1_THREADS unless that is meant",
        )
    return Finding("threads", value)
