"""Where localr1 keeps things: whether it may write there, and how much room is left."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from localr1.doctor.finding import Finding, Verdict
from localr1.doctor.sizes import gib

SMALLEST_DOWNLOAD: Final = 3_554_176_000
"""Bytes of r1-distill-qwen-1.5b as published: 2 a parameter."""
LOW: Final = 15_231_233_024
"""Of r1-distill-qwen-7b."""
MODELS: Final = ("data", "hub cache")
"""The places that hold models; the others hold little."""
LITTLE: Final = 100 << 20
MOVED_BY: Final = {"hub cache": "HF_HUB_CACHE"}
"""The variable that names another folder; LOCALR1_HOME for all others."""


@dataclass(frozen=True)
class Place:
    """nearest: the folder itself, or the one above it that exists. error: why nothing can be
    written there, "" where something can. total, free: bytes of its disk; 0 where it does not say.
    device: of its disk, as stat has it."""

    name: str
    path: str
    exists: bool
    nearest: str
    error: str
    total: int
    free: int
    device: int


def read_places(folders: Mapping[str, Path]) -> tuple[Place, ...]:
    return tuple(_place(name, path) for name, path in folders.items())


def _place(name: str, path: Path) -> Place:
    nearest = next((each for each in (path, *path.parents) if each.exists()), Path(path.anchor))
    total = free = 0
    device = -1
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(nearest)
        total, free = usage.total, usage.free
    with contextlib.suppress(OSError):
        device = os.stat(nearest).st_dev
    return Place(
        name, str(path), path.exists(), str(nearest), _refusal(nearest), total, free, device
    )


def _refusal(folder: Path) -> str:
    """By trying, as permissions alone do not tell of read-only disks, quotas and sandboxes."""
    if not folder.is_dir():
        return "it is not a folder"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or type(error).__name__


def storage_findings(places: tuple[Place, ...]) -> tuple[Finding, ...]:
    return tuple(_finding(place) for place in places)


def _finding(place: Place) -> Finding:
    missing = "" if place.exists else ", not made yet"
    room = f"{gib(place.free)} free of {gib(place.total)}"
    value = f"{place.path}, {room if place.total else 'free space not told'}{missing}"
    variable = MOVED_BY.get(place.name, "LOCALR1_HOME")
    if place.error:
        return Finding(
            place.name,
            value,
            Verdict.PROBLEM,
            f"nothing can be written in {place.nearest} ({place.error})",
            f"mend its permissions, or name another folder in {variable}",
        )
    if not place.total:
        return Finding(place.name, value)
    if place.name not in MODELS:
        if place.free >= LITTLE:
            return Finding(place.name, value)
        why = f"its disk is full but for {place.free / (1 << 20):.0f} MiB"
        return Finding(place.name, value, Verdict.PROBLEM, why, _room(variable))
    if place.free < SMALLEST_DOWNLOAD:
        return Finding(
            place.name,
            value,
            Verdict.PROBLEM,
            f"the disk is too full for even the smallest R1 distill ({gib(SMALLEST_DOWNLOAD)} as "
            "published)",
            _room(variable),
        )
    if place.free < LOW:
        return Finding(
            place.name,
            value,
            Verdict.NOTE,
            f"a 7B distill takes {gib(LOW)} as published",
            _room(variable),
        )
    return Finding(place.name, value)


def _room(variable: str) -> str:
    return f"make room (`localr1 prune`, `localr1 rm`), or name a folder elsewhere in {variable}"
