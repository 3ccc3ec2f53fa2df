"""Main memory: how much there is, how much of it this process may take."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from localr1.cgroup import memory_limit
from localr1.doctor.finding import Finding, Verdict
from localr1.doctor.sizes import gib

GIB: Final = 1 << 30
SMALLEST_DISTILL: Final = int(2.3 * GIB)
"""What r1-distill-qwen-1.5b takes at 4 bits with 8,192 tokens, as `localr1 plan` has it."""
SMALL_MACHINE: Final = int(6.6 * GIB)
"""What r1-distill-qwen-7b takes."""
SWAP_WORTH_A_WORD: Final = 256 << 20


@dataclass(frozen=True)
class MemoryFacts:
    """Bytes. limit, limit_used: of the control group, where one is tighter than the machine;
    limit_file: what says so. is_wsl: Linux inside Windows, which has a share of its memory."""

    total: int
    available: int
    swap_total: int
    swap_used: int
    limit: int | None = None
    limit_used: int = 0
    limit_file: str = ""
    is_wsl: bool = False

    @property
    def usable(self) -> int:
        """What this process can take now."""
        if self.limit is None:
            return self.available
        return max(min(self.available, self.limit - self.limit_used), 0)


def read_memory(root: Path = Path("/")) -> MemoryFacts:
    import psutil

    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    limit = memory_limit(root)
    total = int(memory.total)
    try:
        kernel = (root / "proc" / "version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        kernel = ""
    facts = MemoryFacts(
        total=total,
        available=int(memory.available),
        swap_total=int(swap.total),
        swap_used=int(swap.used),
        is_wsl="microsoft" in kernel.lower(),
    )
    if limit is None or limit.limit >= total:
        return facts
    return MemoryFacts(
        facts.total,
        facts.available,
        facts.swap_total,
        facts.swap_used,
        limit.limit,
        limit.used,
        limit.file,
        facts.is_wsl,
    )


def memory_findings(facts: MemoryFacts) -> tuple[Finding, ...]:
    found = [_main_memory(facts)]
    if facts.limit is not None:
        found.append(_limit(facts, facts.limit))
    found.append(_swap(facts))
    return tuple(found)


def _main_memory(facts: MemoryFacts) -> Finding:
    value = f"{gib(facts.total)}, {gib(facts.available)} free"
    if facts.usable < SMALLEST_DISTILL:
        return Finding(
            "RAM",
            value,
            Verdict.PROBLEM,
            f"only {gib(facts.usable)} can be had now, and the smallest R1 distill takes "
            f"{gib(SMALLEST_DISTILL)} at 4 bits",
            "close other programs, or chat with r1-nano, which takes little",
        )
    if facts.total < SMALL_MACHINE:
        wsl = facts.is_wsl
        return Finding(
            "RAM",
            value,
            Verdict.NOTE,
            f"a 7B model at 4 bits takes {gib(SMALL_MACHINE)}"
            + (", and WSL has only a share of Windows' memory" if wsl else ""),
            "raise `memory` in the file .wslconfig of your Windows user, then `wsl --shutdown`"
            if wsl
            else "keep to r1-distill-qwen-1.5b; `localr1 plan` says what fits",
        )
    return Finding("RAM", value)


def _limit(facts: MemoryFacts, limit: int) -> Finding:
    return Finding(
        "memory limit",
        f"{gib(limit)}, {gib(max(limit - facts.limit_used, 0))} of it free",
        Verdict.NOTE,
        f"this container may take {gib(limit)} of the machine's {gib(facts.total)} "
        f"({facts.limit_file}); `localr1 plan` and loading count with that",
        "raise the limit for larger models (docker run --memory)",
    )


def _swap(facts: MemoryFacts) -> Finding:
    if not facts.swap_total:
        return Finding("swap", "none")
    value = f"{gib(facts.swap_used)} of {gib(facts.swap_total)} used"
    if facts.swap_used < SWAP_WORTH_A_WORD:
        return Finding("swap", value)
    return Finding(
        "swap",
        value,
        Verdict.NOTE,
        "memory was short, and weights that are swapped out are read back at the disk's speed",
        "close other programs before a model is loaded",
    )
