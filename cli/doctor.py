"""`localr1 doctor`: what this machine has, what of it is used, what is not, and why."""

import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localr1 import __version__
from localr1.cli.output import Output
from localr1.settings import Settings, Surroundings

if TYPE_CHECKING:
    from localr1.doctor.finding import Report

COLUMNS = 100
"""That text is broken at, where the terminal is not narrower."""
LEAST_COLUMNS = 40
"""Of the third column, however narrow the terminal is."""
MARKS = {"ok": "", "note": "note", "problem": "PROBLEM"}


def doctor(
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure memory, disks and copies anew: seconds.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Say what this machine has, what localr1 uses of it, what not, and what to do about it."""
    from localr1.doctor.examine import examine

    settings = Settings.from_environment()
    output = Output(color=settings.color)
    with output.progress("looking at this machine"):
        report = examine(
            settings, Surroundings.from_environment(), output.console("stdout"), measure=measure
        )
    if as_json:
        output.json(as_document(report))
    else:
        print_report(output, report)
    if not report.can_run:
        raise typer.Exit(1)


def as_document(report: "Report") -> dict[str, Any]:
    return {
        "version": __version__,
        "can_run": report.can_run,
        "findings": [
            {"area": section.title, **asdict(finding)}
            for section in report.sections
            for finding in section.findings
        ],
        "uses": [asdict(use) for use in report.uses],
        "facts": report.facts,
    }


def print_report(output: Output, report: "Report") -> None:
    """Areas, then uses. A sentence that both have is printed with the use alone."""
    names = [finding.name for finding in report.findings] + [use.part for use in report.uses]
    width = max(map(len, names))
    said_below = {use.sentence for use in report.uses}
    for section in report.sections:
        output.line(section.title)
        for finding in section.findings:
            below = bool(finding.sentence) and finding.sentence in said_below
            value = finding.value + (" (see the end)" if below else "")
            print_row(output, MARKS[finding.verdict], finding.name, value, width)
            if not below:
                print_text(output, finding.sentence, width)
        output.line()
    output.line("what localr1 does with it")
    for use in report.uses:
        mark = "used" if use.is_used else "not used"
        if use.value == mark:
            print_row(output, mark, use.part, use.sentence, width)
        else:
            print_row(output, mark, use.part, use.value, width)
            print_text(output, use.sentence, width)
    output.line()
    output.line(summary(report))


def summary(report: "Report") -> str:
    fatal = [finding.name for finding in report.findings if finding.is_fatal]
    if fatal:
        return f"localr1 cannot run here until this is mended: {', '.join(fatal)}."
    counts = [
        sum(finding.verdict == verdict for finding in report.findings)
        for verdict in ("problem", "note")
    ]
    if not any(counts):
        return "Nothing needs to be done."
    named = [
        f"{count} {word}{'s' if count != 1 else ''}"
        for count, word in zip(counts, ("problem", "note"), strict=True)
        if count
    ]
    return f"localr1 runs here: {' and '.join(named)}."


def print_row(output: Output, mark: str, name: str, value: str, width: int) -> None:
    lines = wrapped(output, value, width) or [""]
    output.line(f"{mark:>9}  {name:<{width}}  {lines[0]}".rstrip())
    for line in lines[1:]:
        output.line(" " * (width + 13) + line)


def print_text(output: Output, text: str, width: int) -> None:
    for line in wrapped(output, text, width):
        output.line(" " * (width + 13) + line)


def wrapped(output: Output, text: str, width: int) -> list[str]:
    """To the third column; what has no blanks, such as a path, is not broken."""
    columns = COLUMNS
    if output.is_terminal("stdout"):
        columns = min(output.console("stdout").width, COLUMNS)
    room = max(columns - width - 13, LEAST_COLUMNS)
    return textwrap.wrap(
        " ".join(text.split()), room, break_on_hyphens=False, break_long_words=False
    )
