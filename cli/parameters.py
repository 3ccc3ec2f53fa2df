"""Sampling parameters as people type them: `-o top_k=40`, `/set parameter seed 7`, `--seed 7`."""

from collections.abc import Iterable, Mapping

from localr1.errors import UsageError

PARAMETERS: dict[str, type[int] | type[float]] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
    "max_tokens": int,
}


def suggestion(word: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known word, or all of them."""
    from difflib import get_close_matches

    known = list(known)
    close = get_close_matches(word, known, n=1)
    return f"Did you mean {close[0]}?" if close else f"There are: {', '.join(known)}."


def parse_parameter(name: str, text: str) -> int | float:
    """The value of one parameter. Raises UsageError for an unknown name or what is no number; the
    range is checked where the value is used."""
    if name not in PARAMETERS:
        raise UsageError(f"unknown parameter {name!r}", fix=suggestion(name, PARAMETERS))
    kind = PARAMETERS[name]
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise UsageError(name, expected=wanted, found=repr(text)) from None


def parse_assignments(
    assignments: Iterable[str], flags: Mapping[str, int | float | None]
) -> dict[str, int | float]:
    """What `-o name=value` and the options of the same names say together; an option wins."""
    values: dict[str, int | float] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError("-o", expected="NAME=VALUE", found=repr(assignment))
        values[name.strip()] = parse_parameter(name.strip(), text.strip())
    return values | {name: value for name, value in flags.items() if value is not None}
