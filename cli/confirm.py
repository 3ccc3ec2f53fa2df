"""Asking before something is deleted."""

import sys

from localr1.cli.output import Output
from localr1.errors import UsageError


def can_ask() -> bool:
    """Whether a person is at the keyboard."""
    return sys.stdin is not None and sys.stdin.isatty()


def confirmed(output: Output, question: str, yes: bool) -> bool:
    """Whether the person agrees; yes: has agreed already, with -y. Raises UsageError where nobody
    can be asked."""
    if yes:
        return True
    if not can_ask():
        raise UsageError(
            "nobody can be asked: stdin is not a terminal",
            fix="Give -y to go ahead without asking.",
        )
    output.text(f"{question} [y/N] ", stream="stderr")
    return sys.stdin.readline().strip().casefold() in ("y", "yes")
