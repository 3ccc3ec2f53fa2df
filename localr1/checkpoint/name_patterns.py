"""Regular expressions from strangers, matched against module names without backtracking.

A checkpoint's `quantization_config` names modules by regular expressions. Python's engine can be
made to run for years by one of them, so the part of the language that such patterns use is matched
here: each node of the pattern maps a position to the set of positions where it can end, computed
once, which bounds a match by (nodes x length squared) steps. Whether it matches is the same as for
`re.match`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from localr1.checkpoint.paths import quoted
from localr1.errors import UnsupportedError

MAX_PATTERN_LENGTH = 1024
MAX_DEPTH = 16
MAX_STEPS = 20_000
"""Of one match, some 10 ms; patterns of released models take at most 1,500 (tested)."""

_COUNT = re.compile(r"\{(\d{1,2})(,)?(\d{1,2})?\}")
_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "w": lambda char: char.isalnum() or char == "_",
    "s": str.isspace,
}


@dataclass(frozen=True, eq=False)
class _Character:
    accepts: Callable[[str], bool]


@dataclass(frozen=True, eq=False)
class _Anchor:
    at_end: bool


@dataclass(frozen=True, eq=False)
class _Look:
    """(?=...) or, negated, (?!...)."""

    inner: "_Node"
    negated: bool


@dataclass(frozen=True, eq=False)
class _Sequence:
    parts: tuple["_Node", ...]


@dataclass(frozen=True, eq=False)
class _Choice:
    parts: tuple["_Node", ...]


@dataclass(frozen=True, eq=False)
class _Repeat:
    """maximum: None for no bound."""

    inner: "_Node"
    minimum: int
    maximum: int | None


_Node = _Character | _Anchor | _Look | _Sequence | _Choice | _Repeat


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` matches at the start of `name`, as `re.match`. Raises UnsupportedError for
    a pattern outside the language (back references, flags, possessive repeats, word boundaries) and
    for one that takes more than MAX_STEPS."""
    node = _parse(pattern)
    try:
        return bool(_Match(name).ends(node, 0))
    except _TooManyStepsError:
        raise UnsupportedError(
            f"name pattern {quoted(pattern)}",
            found=f"more than {MAX_STEPS:,} steps to match a name",
        ) from None


class _TooManyStepsError(Exception):
    pass


@lru_cache(maxsize=1024)
def _parse(pattern: str) -> _Node:
    return _Parser(pattern).parse()


class _Match:
    """One name. Sets of positions are integers, one bit a position."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._known: dict[tuple[_Node, int], int] = {}
        self._steps = 0

    def ends(self, node: _Node, position: int) -> int:
        key = (node, position)
        if key not in self._known:
            self._known[key] = self._compute(node, position)
        return self._known[key]

    def _compute(self, node: _Node, position: int) -> int:
        text = self.text
        here = 1 << position
        match node:
            case _Character():
                accepted = position < len(text) and node.accepts(text[position])
                return here << 1 if accepted else 0
            case _Anchor():
                end = position == len(text) or text[position:] == "\n"
                return here if (end if node.at_end else position == 0) else 0
            case _Look():
                return here if bool(self.ends(node.inner, position)) != node.negated else 0
            case _Sequence():
                reached = here
                for part in node.parts:
                    reached = self._step(part, reached)
                return reached
            case _Choice():
                reached = 0
                for part in node.parts:
                    reached |= self.ends(part, position)
                return reached
            case _Repeat():
                return self._repeat(node, here)

    def _step(self, node: _Node, positions: int) -> int:
        reached = 0
        while positions:
            self._steps += 1
            if self._steps > MAX_STEPS:
                raise _TooManyStepsError
            lowest = positions & -positions
            reached |= self.ends(node, lowest.bit_length() - 1)
            positions ^= lowest
        return reached

    def _repeat(self, node: _Repeat, start: int) -> int:
        positions = start
        for _ in range(node.minimum):
            reached = self._step(node.inner, positions)
            if reached == positions:
                break
            positions = reached
        result = fresh = positions
        count = node.minimum
        while fresh and (node.maximum is None or count < node.maximum):
            fresh = self._step(node.inner, fresh) & ~result
            result |= fresh
            count += 1
        return result


class _Parser:
    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.position = 0
        if len(pattern) > MAX_PATTERN_LENGTH:
            raise self._unsupported(f"more than {MAX_PATTERN_LENGTH:,} characters")

    def parse(self) -> _Node:
        node = self._choice(0)
        if self.position < len(self.pattern):
            raise self._unsupported("a ) without its (")
        return node

    def _unsupported(self, found: str) -> UnsupportedError:
        return UnsupportedError(f"name pattern {quoted(self.pattern)}", found=found)

    def _peek(self, length: int = 1) -> str:
        return self.pattern[self.position : self.position + length]

    def _next(self) -> str:
        char = self._peek()
        if not char:
            raise self._unsupported("an end inside a group, class or escape")
        self.position += 1
        return char

    def _choice(self, depth: int) -> _Node:
        if depth > MAX_DEPTH:
            raise self._unsupported(f"groups nested more than {MAX_DEPTH} deep")
        parts = [self._sequence(depth)]
        while self._peek() == "|":
            self.position += 1
            parts.append(self._sequence(depth))
        return parts[0] if len(parts) == 1 else _Choice(tuple(parts))

    def _sequence(self, depth: int) -> _Node:
        parts: list[_Node] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._quantified(self._atom(depth)))
        return _Sequence(tuple(parts))

    def _quantified(self, node: _Node) -> _Node:
        simple = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(self._peek())
        if simple is not None:
            self.position += 1
            minimum, maximum = simple
        elif self._peek() == "{":
            found = _COUNT.match(self.pattern, self.position)
            if found is None:
                raise self._unsupported("a { that is no count")
            self.position = found.end()
            minimum = int(found[1])
            maximum = (int(found[3]) if found[3] else None) if found[2] else minimum
            if maximum is not None and (maximum < minimum or (found[3] and not found[2])):
                raise self._unsupported("a count out of order")
        else:
            return node
        if isinstance(node, _Anchor | _Look):
            raise self._unsupported("a repeated anchor")
        if self._peek() == "?":  # A lazy repeat matches the same names.
            self.position += 1
        if self._peek() and self._peek() in "*+?{":
            raise self._unsupported("a repeat of a repeat")
        return _Repeat(node, minimum, maximum)

    def _atom(self, depth: int) -> _Node:
        char = self._next()
        if char == "(":
            return self._group(depth)
        if char == "[":
            return self._class()
        if char == ".":
            return _Character(lambda other: other != "\n")
        if char in "^$":
            return _Anchor(at_end=char == "$")
        if char == "\\":
            return _Character(self._escape())
        if char in "*+?{":
            raise self._unsupported("a repeat of nothing")
        return _Character(char.__eq__)

    def _group(self, depth: int) -> _Node:
        look = {"?=": False, "?!": True}.get(self._peek(2))
        if look is not None or self._peek(2) == "?:":
            self.position += 2
        elif self._peek() == "?":
            raise self._unsupported(f"a group that starts with {quoted('(' + self._peek(2))}")
        node = self._choice(depth + 1)
        if self._next() != ")":
            raise self._unsupported("a group without its )")
        return node if look is None else _Look(node, look)

    def _escape(self) -> Callable[[str], bool]:
        char = self._next()
        if char.lower() in _CLASSES:
            accepts = _CLASSES[char.lower()]
            return accepts if char.islower() else lambda other: not accepts(other)
        if char.isalnum():
            raise self._unsupported(quoted("\\" + char))
        return char.__eq__

    def _class(self) -> _Node:
        negated = self._peek() == "^"
        self.position += negated
        accepts: list[Callable[[str], bool]] = []
        first = True
        while first or self._peek() != "]":
            first = False
            char = self._next()
            if char == "\\":
                accepts.append(self._escape())
            elif self._peek() == "-" and self._peek(2) not in ("-", "-]"):
                self.position += 1
                last = self._next()
                if last in "\\[" or last < char:
                    raise self._unsupported("a character range that is not in order")
                accepts.append(_between(char, last))
            else:
                accepts.append(char.__eq__)
        self.position += 1
        return _Character(lambda other: any(each(other) for each in accepts) != negated)


def _between(low: str, high: str) -> Callable[[str], bool]:
    return lambda char: low <= char <= high
