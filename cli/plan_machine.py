"""The machine that `localr1 plan` plans for: this one, or one that is described."""

from dataclasses import dataclass

from localr1.cli.plan import DEVICES
from localr1.errors import MemoryLimitError, UsageError
from localr1.experts.hardware import THIS_MACHINE, HardwareProfile, named_profile
from localr1.experts.options import CardSpec, parse_devices
from localr1.experts.placement import (
    CARD_MARGIN,
    DEVICE_PROGRAM_BYTES,
    Memory,
    default_budget,
)
from localr1.settings import Settings

SYSTEM_BYTES = 3 << 30
"""Main memory that an idle desktop takes: assumed of a machine that is described, not here."""
DESKTOP_BYTES = 512 << 20
"""Graphics memory that its screen takes."""
THREADS = 8
"""Cores of a machine that is described."""


@dataclass(frozen=True)
class CardBudget:
    """budget: bytes of the card with this number that a process may take."""

    number: int
    budget: int


@dataclass(frozen=True)
class Machine:
    """hardware: its bandwidths. memory: what a process may take there. threads: of its CPU.
    option: what the command line must say to mean it; "" for this one. is_measured: whether the
    bandwidths were, or are assumed. cards: that layers of a dense model may go onto, in their
    order."""

    hardware: HardwareProfile
    memory: Memory
    threads: int
    option: str
    is_measured: bool
    cards: tuple[CardBudget, ...] = ()


def machine_named(
    name: str, device: str, settings: Settings, devices: str | None = None
) -> Machine:
    """devices: as `parse_devices` reads them, None for the first. Raises UsageError, NotFoundError,
    FormatError, and MemoryLimitError for more of a card than it has."""
    if device not in DEVICES:
        raise UsageError("--device", expected=" or ".join(DEVICES), found=repr(device)[:40])
    if devices is not None and device == "cpu":
        raise UsageError("--devices", expected="no --device cpu beside it", found="both")
    if name == THIS_MACHINE:
        if devices is not None:
            raise _no_cards(devices)
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
        cards=_cards(hardware, devices) if device == "auto" else (),
    )


def _cards(hardware: HardwareProfile, devices: str | None) -> tuple[CardBudget, ...]:
    """What `chat` would take of each, and a context."""
    if devices is not None and not hardware.has_gpu:
        raise _no_cards(devices)
    specs = (CardSpec(),) if devices is None else parse_devices(devices, None)
    found = []
    for spec in specs if hardware.has_gpu else ():
        if spec.number >= len(hardware.cards):
            raise UsageError(
                "--devices",
                expected=f"cards 0 to {len(hardware.cards) - 1}, of {hardware.name}",
                found=spec.number,
            )
        whole = hardware.cards[spec.number].vram_bytes - CARD_MARGIN
        budget = max(whole - (0 if spec.number else DESKTOP_BYTES), 0)
        if spec.memory is not None:
            budget = _asked_budget(spec.memory + DEVICE_PROGRAM_BYTES, budget)
        found.append(CardBudget(spec.number, budget))
    return tuple(found)


def _asked_budget(asked: int, most: int) -> int:
    if asked > most:
        raise MemoryLimitError(
            "--devices",
            expected=f"at most {(most - DEVICE_PROGRAM_BYTES) / 2**30:.1f} GiB of the card",
            found=f"{(asked - DEVICE_PROGRAM_BYTES) / 2**30:.1f} GiB",
        )
    return asked


def _no_cards(devices: str) -> UsageError:
    return UsageError(
        "--devices",
        expected="a machine whose cards are described",
        found=devices[:40],
        fix="Name one with --hardware.",
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
