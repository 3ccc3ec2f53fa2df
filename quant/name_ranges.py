"""Many names that differ by numbers, as few: "model.layers.3-60.mlp.experts.0-255.up_proj"."""

from collections.abc import Iterable, Sequence

Numbers = tuple[int, ...]


def name_ranges(names: Iterable[str]) -> list[str]:
    """Every name once, in the order in which their kinds come first. A part of a name between dots
    that is a number becomes a range "first-last" where all numbers between them are there, with
    the same numbers behind each."""
    kinds: dict[tuple[str | None, ...], set[Numbers]] = {}
    for name in names:
        parts = name.split(".")
        kind = tuple(None if part.isdecimal() else part for part in parts)
        numbers = tuple(int(part) for part in parts if part.isdecimal())
        kinds.setdefault(kind, set()).add(numbers)
    found = []
    for kind, members in kinds.items():
        for ranges in _ranges(members):
            places = iter(ranges)
            found.append(".".join(next(places) if part is None else part for part in kind))
    return found


def _ranges(members: Iterable[Numbers]) -> list[tuple[str, ...]]:
    """members: all of the same length."""
    behind: dict[int, list[Numbers]] = {}
    for first, *rest in sorted(filter(None, members)):
        behind.setdefault(first, []).append(tuple(rest))
    if not behind:
        return [()]
    groups: list[tuple[list[int], list[tuple[str, ...]]]] = []
    for number, further in behind.items():
        ranges = _ranges(further)
        if groups and groups[-1][0][-1] == number - 1 and groups[-1][1] == ranges:
            groups[-1][0].append(number)
        else:
            groups.append(([number], ranges))
    return [(_range(run), *ranges) for run, inner in groups for ranges in inner]


def _range(run: Sequence[int]) -> str:
    return str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"
