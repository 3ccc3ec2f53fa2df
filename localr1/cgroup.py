"""What a container may take of its machine: the limits of Linux control groups, version 1 and 2.

psutil and /proc/meminfo tell of the whole machine; a process that takes more than its group may is
killed. Formats: the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

UNLIMITED: Final = 1 << 60
"""Bytes from which on version 1 means that there is no limit: it says 2^63 less a page."""
MAX_FILE: Final = 1 << 16


@dataclass(frozen=True)
class MemoryLimit:
    """limit: bytes that the group may take. used: of them, without the files' cache that the kernel
    gives back when memory is short. file: what says so."""

    limit: int
    used: int
    file: str


def memory_limit(root: Path = Path("/")) -> MemoryLimit | None:
    """The tightest of the groups that this process is in; None where none limits it, and on other
    systems. root: of the file system, with proc and sys below it."""
    found = [
        MemoryLimit(limit, _used(folder, version), str(folder / name))
        for folder, version in _folders(root, "memory")
        for name in ("memory.max" if version == 2 else "memory.limit_in_bytes",)
        if (limit := _number(folder / name)) is not None and limit < UNLIMITED
    ]
    return min(found, key=lambda each: each.limit, default=None)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: of the machine's, and of its groups'."""
    import psutil

    available = int(psutil.virtual_memory().available)
    group = memory_limit(root)
    return available if group is None else min(available, max(group.limit - group.used, 0))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Processors whose time the groups of this process may take: 1.5 is one and a half of them.
    None where none limits it."""
    quotas = []
    for folder, version in _folders(root, "cpu"):
        if version == 2:
            words = (_text(folder / "cpu.max") or "").split()
            quota, period = (*map(_whole, words), None, None)[:2]
        else:
            quota = _number(folder / "cpu.cfs_quota_us")
            period = _number(folder / "cpu.cfs_period_us")
        if quota is not None and period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def _folders(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """(folder, version of its format) of each group, from this process's own up to the topmost that
    is visible: a limit of any holds."""
    groups = root / "sys" / "fs" / "cgroup"
    for line in (_text(root / "proc" / "self" / "cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            version, top = 2, groups
        elif controller in controllers.split(","):
            version, top = 1, groups / controller
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        if ".." in inside.parts:  # A group outside of what a container sees.
            inside = PurePosixPath()
        for group in (inside, *inside.parents):
            yield top / group, version


def _used(folder: Path, version: int) -> int:
    name, inactive = (
        ("memory.current", "inactive_file")
        if version == 2
        else ("memory.usage_in_bytes", "total_inactive_file")
    )
    used = _number(folder / name) or 0
    for line in (_text(folder / "memory.stat") or "").splitlines():
        key, _, value = line.partition(" ")
        if key == inactive:
            used -= _whole(value) or 0
    return max(used, 0)


def _number(path: Path) -> int | None:
    return _whole(_text(path) or "")


def _whole(text: str) -> int | None:
    """None for "max" and -1, which stand for no limit, and for what is no number."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _text(path: Path) -> str | None:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(MAX_FILE)
    except OSError:
        return None
