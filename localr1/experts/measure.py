"""What this machine can do, measured in a second and remembered."""

import contextlib
import json
import mmap
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import psutil
import torch

from localr1 import __version__
from localr1.checkpoint.strict_json import read_object
from localr1.errors import LocalR1Error
from localr1.experts.hardware import HardwareProfile, profile_of
from localr1.kernels.api import PackedWeight
from localr1.kernels.native import NativeKernels
from localr1.qtypes import QuantScheme

CACHE_NAME: Final = "hardware.json"
ROWS, COLUMNS = 2048, 7168
"""Of a matrix as an expert of R1 has them: 8 MB at 4 bits."""
MATRICES: Final = 16
"""Together they are in no cache."""
REPETITIONS: Final = 3
PROMPT: Final = 256
"""Tokens of a prompt's product."""
FILE_BYTES: Final = 64 << 20
WRITING_SECONDS: Final = 0.3
BLOCK: Final = 4 << 20
"""Bytes of one read: about an expert."""
READS: Final = 4
READING_SECONDS: Final = 0.15
MEASURED: Final = "this machine, measured"
"""The name of a profile of which nothing is assumed."""
ASSUMED_DISK: Final = 3.0
"""GB/s, where no read can pass by the system's cache: an NVMe drive of the slower kind."""


def this_machine(
    cache_dir: Path, *, threads: int | None = None, anew: bool = False
) -> HardwareProfile:
    """As it was measured once, by a file in cache_dir; anew: measure whatever is there."""
    with contextlib.suppress(OSError):
        cache_dir.mkdir(parents=True, exist_ok=True)
    kept = None if anew else remembered(cache_dir, threads=threads)
    if kept is not None:
        return kept.profile
    profile = measure(cache_dir, threads=threads)
    document = {"profile": asdict(profile), "measured_at": time.time()}
    keep(cache_dir / CACHE_NAME, {"identity": identity(cache_dir, threads), **document})
    return profile


@dataclass(frozen=True)
class Remembered:
    """measured_at: seconds since 1970."""

    profile: HardwareProfile
    measured_at: float


def remembered(cache_dir: Path, *, threads: int | None = None) -> Remembered | None:
    """What was measured of just this machine, threads and disk; None where nothing was, or what was
    cannot be read. Measures and writes nothing."""
    path = cache_dir / CACHE_NAME
    document = kept_document(path, identity(cache_dir, threads))
    if document is None:
        return None
    profile, measured_at = document.get("profile"), document.get("measured_at")
    if not isinstance(profile, dict) or not isinstance(measured_at, int | float):
        return None
    try:
        return Remembered(profile_of(profile, str(path)), float(measured_at))
    except LocalR1Error:
        return None


def measure(directory: Path, *, threads: int | None = None) -> HardwareProfile:
    """directory: on the disk that experts would be read from. No GPU is counted: nothing here
    measures one yet."""
    read = cpu_bandwidth(threads)
    disk = disk_bandwidth(directory)
    name = MEASURED
    if disk is None:
        name += f", but for its disk, taken as {ASSUMED_DISK:g} GB/s"
    return HardwareProfile(
        name=name,
        vram_bytes=0,
        ram_bytes=int(psutil.virtual_memory().total),
        gpu_large=0.0,
        gpu_small=0.0,
        pcie=0.0,
        cpu=read,
        dense=read,
        disk=ASSUMED_DISK if disk is None else disk,
        round_trip_us=0.0,
        cpu_gmacs=cpu_products(threads),
    )


def cpu_bandwidth(threads: int | None = None) -> float:
    """GB/s at which the kernels read 4-bit weights that are in no cache, for one token."""
    kernels = NativeKernels(threads=threads)
    weights = [kernels.prepare(_matrix()) for _ in range(MATRICES)]
    x = torch.ones(1, COLUMNS)
    best = float("inf")
    for _ in range(REPETITIONS):
        begin = time.perf_counter()
        for weight in weights:
            kernels.linear(x, weight)
        best = min(best, time.perf_counter() - begin)
    return sum(weight.nbytes for weight in weights) / best / 1e9


def cpu_products(threads: int | None = None) -> float:
    """10^9 multiply-adds a second of the kernels' products with a prompt's activations."""
    kernels = NativeKernels(threads=threads)
    weight = kernels.prepare(_matrix())
    x = torch.ones(PROMPT, COLUMNS)
    best = float("inf")
    for _ in range(REPETITIONS):
        begin = time.perf_counter()
        kernels.linear(x, weight)
        best = min(best, time.perf_counter() - begin)
    return PROMPT * ROWS * COLUMNS / best / 1e9


def _matrix() -> PackedWeight:
    scheme = QuantScheme(4, 32)
    words = torch.zeros(ROWS, scheme.packed_words(COLUMNS), dtype=torch.int32)
    scale = torch.full((ROWS, COLUMNS // scheme.group_size), 1e-3, dtype=torch.bfloat16)
    return PackedWeight(words, scale, None, scheme, ROWS, COLUMNS)


def disk_bandwidth(directory: Path) -> float | None:
    """GB/s of direct reads of BLOCK bytes, READS at once, from a file that is written for it. None
    where the file cannot be made, or the system has no reads past its cache."""
    direct = getattr(os, "O_DIRECT", 0)
    if not direct:
        return None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _file_to_read(directory) as (path, size):
            descriptor = os.open(path, os.O_RDONLY | direct)
            try:
                return _read_bandwidth(descriptor, size // BLOCK)
            finally:
                os.close(descriptor)
    except OSError:
        return None


@contextlib.contextmanager
def _file_to_read(directory: Path) -> Iterator[tuple[str, int]]:
    """(path, bytes): whole blocks, at least one, on the disk and not only on its way there."""
    handle, path = tempfile.mkstemp(prefix=".localr1-disk-", dir=directory)
    try:
        with os.fdopen(handle, "wb") as file:
            block = os.urandom(BLOCK)  # Zeros might never be stored.
            begin = time.perf_counter()
            while file.tell() < FILE_BYTES and (
                not file.tell() or time.perf_counter() - begin < WRITING_SECONDS
            ):
                file.write(block)
                file.flush()
                os.fsync(file.fileno())
            size = file.tell()
        yield path, size
    finally:
        os.unlink(path)


def _read_bandwidth(descriptor: int, blocks: int) -> float:
    buffers = [mmap.mmap(-1, BLOCK) for _ in range(READS)]  # Page-aligned, as direct reads must be.
    begin = time.perf_counter()

    def read(worker: int) -> int:
        count = 0
        while count == 0 or time.perf_counter() - begin < READING_SECONDS:
            block = (worker + READS * count) % blocks
            count += 1
            if os.preadv(descriptor, [buffers[worker]], block * BLOCK) != BLOCK:
                raise OSError("a short read")
        return count

    with ThreadPoolExecutor(READS) as pool:
        done = sum(pool.map(read, range(READS)))
    return done * BLOCK / (time.perf_counter() - begin) / 1e9


def identity(directory: Path, threads: int | None) -> dict[str, Any]:
    """What, when it changes, makes a measurement worthless."""
    try:
        disk = os.stat(directory).st_dev
    except OSError:
        disk = -1
    return {
        "version": __version__,
        "machine": platform.node(),
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "memory": int(psutil.virtual_memory().total),
        "threads": threads or 0,
        "disk": disk,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()[:200]
    except OSError:
        pass
    return platform.processor()[:200]


def kept_document(path: Path, of: dict[str, Any]) -> dict[str, Any] | None:
    """What `keep` wrote of the machine with this identity; None for anything else."""
    try:
        document = read_object(path, str(path), max_bytes=1 << 16)
    except LocalR1Error:
        return None
    return document if document.get("identity") == of else None


def keep(path: Path, document: dict[str, Any]) -> None:
    """Where nothing can be written, it is measured again next time."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(document, indent=2))
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
