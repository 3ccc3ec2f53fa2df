"""What the GPU kernels take: registers and shared memory of each, on every architecture, as NVRTC's
assembler reports them. Needs no GPU. Writes tests/data/gpu_resources.txt, which a test compares.
"""

import hashlib
import importlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from localr1.kernels.gpu_program import PROGRAMS, compile_program, compiler_version

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "data" / "gpu_resources.txt"
LOGS = ROOT / "build" / "gpu_resources"
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
THREADS = 2


@dataclass(frozen=True)
class Resources:
    """Of one kernel: registers a thread, bytes of shared memory a block, bytes of stack and of
    spilled registers a thread."""

    registers: int
    shared: int
    stack: int
    spilled: int


def parse_log(log: str) -> dict[str, Resources]:
    """By kernel, from the words of ptxas -v."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part[: part.index("'")]
        stack, stores, loads = _numbers(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        shared = re.search(r"(\d+) bytes smem", part)
        (registers,) = _numbers(r"Used (\d+) registers", part)
        found[name] = Resources(
            registers,
            int(shared.group(1)) if shared else 0,
            stack,
            stores + loads,
        )
    return found


def _numbers(pattern: str, text: str) -> Iterator[int]:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"ptxas does not say {pattern!r}: {text[:200]!r}")
    return map(int, match.groups())


def rows_per_block(file: str) -> tuple[int, ...]:
    """A program that reads row blocks is compiled for both sizes, any other once."""
    text = (ROOT / "cuda" / "gpu" / file).read_text(encoding="utf-8")
    return (16, 8) if re.search(r'#include "(products|tiles)\.h"', text) else (16,)


def resources_of(file: str, arch: str, rows: int) -> dict[str, Resources]:
    """Compiled again only when a source or the compiler has changed."""
    sources = ROOT / "cuda"
    digest = hashlib.sha256(f"{file} {arch} {rows} {compiler_version()}".encode())
    for path in sorted(
        [*sources.glob("*.h"), *(sources / "gpu").glob("*.h"), sources / "gpu" / file]
    ):
        digest.update(path.read_bytes())
    kept = LOGS / f"{digest.hexdigest()[:32]}.log"
    if not kept.is_file():
        log = compile_program(sources, file, arch, rows).log
        LOGS.mkdir(parents=True, exist_ok=True)
        kept.write_text(log, encoding="utf-8")
    return parse_log(kept.read_text(encoding="utf-8"))


def all_resources() -> dict[tuple[str, str], dict[str, Resources]]:
    """By (kernel, row blocks): by architecture. A kernel that reads no row blocks has "-" there."""
    cases = [
        (file, arch, rows)
        for file in PROGRAMS
        for rows in rows_per_block(file)
        for arch in ARCHITECTURES
    ]
    importlib.import_module("cuda.core")  # Two threads that import it first find half of it.
    with ThreadPoolExecutor(THREADS) as pool:
        parts = pool.map(lambda case: resources_of(*case), cases)
    table: dict[tuple[str, str], dict[str, Resources]] = {}
    for (file, arch, rows), part in zip(cases, parts, strict=True):
        for kernel, resources in part.items():
            variant = str(rows) if len(rows_per_block(file)) > 1 else "-"
            table.setdefault((kernel, variant), {})[arch] = resources
    return table


def render(table: dict[tuple[str, str], dict[str, Resources]]) -> str:
    lines = [
        "# Registers a thread by architecture, bytes of shared memory a block: as the assembler",
        f"# of NVRTC {compiler_version()} reports them.",
        "# Written by scripts/gpu_resources.py; rows: of a row block. Nothing is spilled.",
        " ".join([f"{'kernel':28} {'rows':>4}", *(f"{a:>6}" for a in ARCHITECTURES), "shared"]),
    ]
    for (kernel, rows), by_arch in sorted(table.items()):
        registers = (f"{by_arch[arch].registers:>6}" for arch in ARCHITECTURES)
        shared = max(resources.shared for resources in by_arch.values())
        lines.append(" ".join([f"{kernel:28} {rows:>4}", *registers, f"{shared:>6}"]))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(render(all_resources()), encoding="utf-8")
    print(TABLE.read_text(encoding="utf-8"), end="")
