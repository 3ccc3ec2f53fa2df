"""What was found, and whether anything should be done about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

WRITTEN_SMALL: Final = ("localr1", "torch")
"""Names that keep their small letter at the head of a sentence."""


class Verdict(StrEnum):
    """note: works, but slower or with less than it could. problem: something fails until mended."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """why, fix: clauses without a stop at their end, which make one sentence; empty where there is
    nothing to say. is_fatal: localr1 cannot run at all."""

    name: str
    value: str
    verdict: Verdict = Verdict.OK
    why: str = ""
    fix: str = ""
    is_fatal: bool = False

    @property
    def sentence(self) -> str:
        return sentence(self.why, self.fix)


@dataclass(frozen=True)
class Use:
    """A part of the machine. value: how localr1 uses it, or that it does not."""

    part: str
    is_used: bool
    value: str
    why: str = ""
    fix: str = ""

    @property
    def sentence(self) -> str:
        return sentence(self.why, self.fix)


@dataclass(frozen=True)
class Section:
    title: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Report:
    """facts: what the findings were made of, by area, ready for JSON."""

    sections: tuple[Section, ...]
    uses: tuple[Use, ...]
    facts: dict[str, Any]

    @property
    def findings(self) -> list[Finding]:
        return [finding for section in self.sections for finding in section.findings]

    @property
    def can_run(self) -> bool:
        return not any(finding.is_fatal for finding in self.findings)


def sentence(why: str, fix: str) -> str:
    """Of two clauses: "why: fix."; empty where there is no why."""
    if not why:
        return ""
    first = why if why.startswith(WRITTEN_SMALL) else why[0].upper() + why[1:]
    return f"{first}{': ' + fix if fix else ''}."


def listed(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
