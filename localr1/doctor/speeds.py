"""How fast memory, disks and copies are: what localr1.experts.measure found, now or earlier."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from localr1.doctor.copies import CopySpeeds, cuda_copy_speeds
from localr1.doctor.finding import Finding, Verdict, listed
from localr1.doctor.sizes import age
from localr1.doctor.storage import MODELS, Place

if TYPE_CHECKING:
    from localr1.experts.hardware import HardwareProfile

FILE_NAME: Final = "doctor.json"
"""Beside measure's own file: what it has no place for."""
SLOW_DISK: Final = 1.0
"""GB/s: a drive on SATA reaches half of it, one on NVMe three times as much and more."""
BUSY: Final = 0.2
"""Share of the processor's time from which on others spoil a measurement."""
WATCHED_SECONDS: Final = 0.3
HOW: Final = "`localr1 doctor --measure` takes a few seconds"


@dataclass(frozen=True)
class DiskSpeed:
    """speed: GB/s of direct reads; None where none could be made. places: that lie on it."""

    places: tuple[str, ...]
    path: str
    speed: float | None


@dataclass(frozen=True)
class SpeedFacts:
    """memory: GB/s at which the kernels read weights that are in no cache. products: 10^9
    multiply-adds a second of a prompt. Both None where nothing was measured. measured_at: seconds
    since 1970. busy: share of the processor's time that other programs took just before.
    copies_error: why no copies to a card could be measured."""

    memory: float | None = None
    products: float | None = None
    disks: tuple[DiskSpeed, ...] = ()
    copies: tuple[CopySpeeds, ...] = ()
    copies_error: str = ""
    measured_at: float | None = None
    busy: float = 0.0


def read_speeds(
    cache_dir: Path,
    threads: int | None,
    places: Sequence[Place],
    cards: Mapping[str, int],
    *,
    anew: bool,
) -> SpeedFacts:
    """cards: the driver's numbers of those that torch can open, by their UUIDs. anew: measure; else
    only what is remembered, which may be nothing. Imports torch."""
    from localr1.experts import measure

    shared = disks_of(places)
    if anew:
        busy = _busy()
        profile = measure.this_machine(cache_dir, threads=threads, anew=True)
        cache_device = _device(cache_dir)
        known = profile.disk if profile.name == measure.MEASURED else None
        disks = {
            device: known
            if known is not None and device == cache_device
            else _disk_speed(Path(folder))
            for device, (_, folder) in shared.items()
        }
        copies, error = _copies(cards)
        document: dict[str, Any] = {
            "identity": measure.identity(cache_dir, threads),
            "disks": {str(device): speed for device, speed in disks.items()},
            "copies": [asdict(each) for each in copies],
            "busy": busy,
        }
        measure.keep(cache_dir / FILE_NAME, document)
        facts = _facts(profile, shared, disks, copies, time.time())
        return replace(facts, copies_error=error, busy=busy)
    kept = measure.remembered(cache_dir, threads=threads)
    if kept is None:
        return SpeedFacts()
    identity = measure.identity(cache_dir, threads)
    document = measure.kept_document(cache_dir / FILE_NAME, identity) or {}
    disks, copies = read_document(document)
    kept_busy = document.get("busy")
    if kept.profile.name == measure.MEASURED:
        disks.setdefault(_device(cache_dir), kept.profile.disk)
    facts = _facts(kept.profile, shared, disks, copies, kept.measured_at)
    return replace(facts, busy=kept_busy if isinstance(kept_busy, float) else 0.0)


def disks_of(places: Sequence[Place]) -> dict[int, tuple[tuple[str, ...], str]]:
    """The disks that models are read from: places on each, and a folder there."""
    found: dict[int, tuple[tuple[str, ...], str]] = {}
    for place in places:
        if place.name in MODELS:
            names, folder = found.get(place.device, ((), place.nearest))
            found[place.device] = ((*names, place.name), folder)
    return found


def read_document(document: dict[str, Any]) -> tuple[dict[int, float | None], list[CopySpeeds]]:
    """Of FILE_NAME, leaving out what it cannot have been written with."""
    kept = document.get("disks")
    disks = {
        int(device): None if speed is None else float(speed)
        for device, speed in (kept.items() if isinstance(kept, dict) else ())
        if device.lstrip("-").isdigit() and isinstance(speed, int | float | None)
    }
    copies = []
    listed_copies = document.get("copies")
    for each in listed_copies if isinstance(listed_copies, list) else ():
        try:
            copies.append(CopySpeeds(**{name: each[name] for name in CopySpeeds.__match_args__}))
        except (TypeError, KeyError):
            continue
    return disks, copies


def _facts(
    profile: "HardwareProfile",
    shared: dict[int, tuple[tuple[str, ...], str]],
    disks: dict[int, float | None],
    copies: Sequence[CopySpeeds],
    measured_at: float,
) -> SpeedFacts:
    return SpeedFacts(
        memory=profile.cpu,
        products=profile.cpu_gmacs,
        disks=tuple(
            DiskSpeed(names, folder, disks[device])
            for device, (names, folder) in shared.items()
            if device in disks
        ),
        copies=tuple(copies),
        measured_at=measured_at,
    )


def _busy() -> float:
    import psutil

    return float(psutil.cpu_percent(WATCHED_SECONDS)) / 100


def _device(folder: Path) -> int:
    try:
        return os.stat(folder).st_dev
    except OSError:
        return -1


def _disk_speed(folder: Path) -> float | None:
    from localr1.experts.measure import disk_bandwidth

    return disk_bandwidth(folder)


def _copies(cards: Mapping[str, int]) -> tuple[list[CopySpeeds], str]:
    if not cards:
        return [], ""
    import torch

    found = []
    for number in range(torch.cuda.device_count()):
        try:
            found.append(cuda_copy_speeds(number, cards))
        except RuntimeError as error:  # torch's for an error of CUDA, out of memory included.
            return found, f"{str(error).splitlines()[0][:200]}"
    return found, ""


def speed_findings(facts: SpeedFacts, threads: int, now: float) -> tuple[Finding, ...]:
    if facts.memory is None or facts.measured_at is None:
        return (Finding("measured", f"not yet: {HOW}"),)
    when = age(max(now - facts.measured_at, 0.0))
    found = [
        _measured(when if when == "just now" else f"{when}; {HOW}", facts.busy),
        Finding("RAM", f"{facts.memory:.1f} GB/s read by the kernels with {threads} threads"),
    ]
    if facts.products:
        found.append(Finding("prompts", f"{facts.products:.0f} x 10^9 multiply-adds a second"))
    found += [_disk(disk) for disk in facts.disks]
    for copies in facts.copies:
        found.append(
            Finding(
                f"card {copies.card}",
                f"{copies.to_card:.1f} GB/s to it, {copies.from_card:.1f} from it, "
                f"{copies.pageable:.1f} to it from ordinary memory, {copies.within:.0f} within it",
            )
        )
    if facts.copies_error:
        found.append(
            Finding(
                "copies",
                "not measured",
                Verdict.NOTE,
                f"the card could not be copied to ({facts.copies_error})",
                "close other programs that use it, and measure again",
            )
        )
    return tuple(found)


def _measured(when: str, busy: float) -> Finding:
    if busy < BUSY:
        return Finding("measured", when)
    return Finding(
        "measured",
        when,
        Verdict.NOTE,
        f"other programs took {busy:.0%} of the processor's time then, so that the figures are "
        "lower than what it can do",
        "close them, and measure again",
    )


def _disk(disk: DiskSpeed) -> Finding:
    of = listed(disk.places)
    if disk.speed is None:
        return Finding("disk", f"of {of}: no read can pass by the system's cache there")
    value = f"{disk.speed:.2f} GB/s, of {of}"
    if disk.speed >= SLOW_DISK:
        return Finding("disk", value)
    return Finding(
        "disk",
        value,
        Verdict.NOTE,
        "experts that RAM has no room for are read at this speed, and models are loaded at it",
        "keep models on an NVMe drive (LOCALR1_HOME, HF_HUB_CACHE)",
    )
