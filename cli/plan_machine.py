"""The machine that `localr1 plan` plans for: this one, or one that is described."""

from dataclasses import dataclass

from localr1.cli.plan import DEVICES
from localr1.errors import UsageError
from localr1.experts.hardware import THIS_MACHINE, HardwareProfile, named_profile
from localr1.experts.placement import Memory, default_budget
from localr1.settings import Settings

SYSTEM_BYTES = 3 << 30
"""Main memory that an idle desktop takes: assumed of a machine that is described, not here."""
DESKTOP_BYTES = 512 << 20
"""Graphics memory that its screen takes."""
THREADS = 8
"""Cores of a machine that is described."""


@dataclass(frozen=True)
class Machine:
    """hardware: its bandwidths. memory: what a process may take there. threads: of its CPU.
    option: what the command line must say to mean it; "" for this one. is_measured: whether the
    bandwidths were, or are assumed."""

    hardware: HardwareProfile
    memory: Memory
    threads: int
    option: str
    is_measured: bool


def machine_named(name: str, device: str, settings: Settings) -> Machine:
    """Raises UsageError, NotFoundError and FormatError."""
    if device not in DEVICES:
        raise UsageError("--device", expected=" or ".join(DEVICES), found=repr(device)[:40])
    if name == THIS_MACHINE:
        return this_machine(settings)
    hardware = named_profile(name)
    vram = default_budget(hardware.vram_bytes - DESKTOP_BYTES)
    return Machine(
        hardware=hardware,
        memory=Memory(
            ram=default_budget(hardware.ram_bytes - SYSTEM_BYTES),
            vram=vram if hardware.has_gpu and device == "auto" else None,
        ),
        threads=THREADS,
        option=f" --hardware {name}",
        is_measured=False,
    )


def this_machine(settings: Settings) -> Machine:
    """What is free now, this process's own memory included: it will be gone when a model runs."""
    import psutil

    from localr1.cgroup import available_memory
    from localr1.experts import measure
    from localr1.kernels.native import default_threads

    own = int(psutil.Process().memory_info().rss)
    available = available_memory()
    return Machine(
        hardware=measure.this_machine(settings.cache_dir, threads=settings.threads),
        memory=Memory(ram=default_budget(available, held=own)),
        threads=settings.threads or default_threads(),
        option="",
        is_measured=True,
    )
