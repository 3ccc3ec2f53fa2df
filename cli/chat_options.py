"""Options of `localr1 chat` about thinking, sessions and the form of answers."""

from pathlib import Path
from typing import Annotated

import typer

from localr1.errors import UsageError

NO_THINKING = (
    "This model's chat template has no thinking: it answers as it does, and only a thought that it "
    "opens by itself has a budget."
)
CLOSED = {
    "budget": "the thought reached its budget and was closed",
    "asked": "asked to answer: the thought was closed",
}

DROP_OLDEST = "drop-oldest"
ON_FULL = ("stop", DROP_OLDEST)


def session_wanted(resume: str | None, continues: bool) -> str | None:
    """What --resume and --continue ask for: an ID, a name, "last", or none. Raises UsageError for
    both."""
    if continues and resume is not None:
        raise UsageError("--resume and --continue", expected="one of them", found="both")
    return "last" if continues else resume


def check_on_full(value: str) -> str:
    """Raises UsageError."""
    if value not in ON_FULL:
        raise UsageError("--on-full", expected=" or ".join(ON_FULL), found=repr(value)[:40])
    return value


OnFullOption = Annotated[
    str,
    typer.Option(
        "--on-full", help="Where the context is full: stop, or drop-oldest turns.", metavar="WHAT"
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option("--format", metavar="json", help="Answer with a JSON object; thinking is free."),
]
SchemaOption = Annotated[
    Path | None,
    typer.Option("--schema", metavar="FILE", help="Answer with JSON that fits this JSON schema."),
]
LookAheadOption = Annotated[
    bool,
    typer.Option(
        "--look-ahead/--no-look-ahead",
        help="Compute along what came next the last time, while it pays; changes no token.",
    ),
]
KvBitsOption = Annotated[
    int | None,
    typer.Option("--kv-bits", metavar="8|16", help="Bits of cached keys and values; default 16."),
]
ThinkBudgetOption = Annotated[
    int | None,
    typer.Option(
        "--think-budget", metavar="N", min=0, help="Answer after N tokens of thinking at the most."
    ),
]
ResumeOption = Annotated[
    str | None,
    typer.Option("--resume", metavar="ID", help="Go on with a session: its ID, name, or last."),
]
ContinueOption = Annotated[bool, typer.Option("--continue", help="Go on with the last session.")]
NoSessionOption = Annotated[
    bool, typer.Option("--no-session", help="Do not keep the conversation.")
]
NoThinkOption = Annotated[
    bool, typer.Option("--no-think", help="Answer without thinking: an empty thinking block.")
]
