"""JSON from strangers: bounded before it is parsed, and without JSON's ambiguities.

Refused beyond what the `json` module refuses: too large, too deep, too many values, duplicate keys,
NaN and Infinity in any spelling (1e999 too), integers beyond 64 bits, lone surrogates.
"""

import gc
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from localr1.checkpoint.files import decode_utf8, read_bounded
from localr1.checkpoint.paths import quoted
from localr1.errors import FormatError

MAX_BYTES = 16 << 20
MAX_DEPTH = 64
MAX_VALUES = 1_000_000
"""Commas and opening brackets. A hostile value costs some 100 bytes of memory, so this bounds the
parsed document at about 100 MB however it is built."""

_INTEGER_DIGITS = 20
_FLOAT_DIGITS = 400
_LONG_INTEGER = re.compile(rb"[0-9]{19}")
"""From 19 digits on an integer may not fit 64 bits."""

_OPENING, _CLOSING = b"[{", b"]}"
_STEP = np.zeros(256, dtype=np.int8)
"""What a byte outside of strings does to the depth."""
_STEP[list(_OPENING)], _STEP[list(_CLOSING)] = 1, -1
_LONE_SURROGATE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)

T = TypeVar("T")


@contextmanager
def collection_paused() -> Iterator[None]:
    """No cycle collection inside: a header of 200,000 tensors makes a million objects and no cycle,
    and looking for cycles among them would take most of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def parse_json(
    data: bytes,
    shown: str,
    *,
    max_bytes: int = MAX_BYTES,
    max_values: int = MAX_VALUES,
    max_objects: int = MAX_VALUES,
) -> Any:
    """`data` as a document. shown: how messages call it. Raises FormatError, nothing else."""
    if len(data) > max_bytes:
        raise FormatError(
            f"{shown}: too large", expected=f"at most {max_bytes:,} bytes", found=f"{len(data):,}"
        )
    text = decode_utf8(data, shown)
    structure = _structure(data)
    objects = structure.count(b"{")
    if objects > max_objects:
        raise FormatError(
            f"{shown}: too many objects", expected=f"at most {max_objects:,}", found=f"{objects:,}"
        )
    _check_structure(structure, shown, max_values)
    _check_surrogates(data, shown)
    reader = _Reader(shown)
    try:
        with collection_paused():
            return json.loads(
                text,
                object_pairs_hook=reader.pairs,
                # Python called for every integer would be most of what a large header takes.
                parse_int=reader.integer if _LONG_INTEGER.search(structure) else None,
                parse_float=reader.number,
                parse_constant=reader.constant,
            )
    except json.JSONDecodeError as error:
        raise FormatError(
            f"{shown}: is not valid JSON",
            found=f"{error.msg} at line {error.lineno}, column {error.colno}",
        ) from error


def parse_object(data: bytes, shown: str, **limits: int) -> dict[str, Any]:
    """As `parse_json`, for a document that must be an object."""
    document = parse_json(data, shown, **limits)
    if not isinstance(document, dict):
        raise FormatError(shown, expected="a JSON object", found=kind_of(document))
    return document


def read_object(path: Path, shown: str, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file."""
    return parse_object(read_bounded(path, shown, max_bytes), shown, max_bytes=max_bytes)


def required(values: Mapping[str, Any], key: str, kind: type[T], shown: str) -> T:
    """values[key], which must be there and be a `kind` (true is not an integer)."""
    if key not in values:
        raise FormatError(f"{shown}: {key} is missing", expected=_KINDS.get(kind, kind.__name__))
    value = values[key]
    if isinstance(value, kind) and kind is not int:
        return value  # A header may have 600,000 of these: no text is made for a good one.
    return expect(value, kind, f"{shown}: {key}")


def optional(values: Mapping[str, Any], key: str, kind: type[T], shown: str) -> T | None:
    """values[key] as a `kind`, None when absent or null."""
    value = values.get(key)
    return None if value is None else expect(value, kind, f"{shown}: {key}")


def expect(value: object, kind: type[T], shown: str) -> T:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise FormatError(
            shown,
            expected=_KINDS.get(kind, kind.__name__),
            found=f"{kind_of(value)} {quoted(value)}",
        )
    return value


_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    type(None): "null",
}


def kind_of(value: object) -> str:
    """JSON's word for a parsed value's type."""
    return _KINDS.get(type(value), type(value).__name__)


def _structure(data: bytes) -> bytes:
    """The bytes outside of strings, of each string only its closing quote."""
    # Without escaped backslashes every \\" is an escaped quote; without those a quote is an end of
    # a string, and the number of quotes so far says whether a byte is inside one.
    bare = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    codes = np.frombuffer(bare, dtype=np.uint8)
    inside = np.bitwise_xor.accumulate((codes == ord('"')).view(np.uint8))
    outside: bytes = codes[inside == 0].tobytes()
    return outside


def _check_structure(structure: bytes, shown: str, max_values: int) -> None:
    """Bound depth and number of values by linear scans, so that parsing can exhaust nothing."""
    codes = np.frombuffer(structure, dtype=np.uint8)
    steps = _STEP[codes]
    values = int(np.count_nonzero(steps == 1)) + int(np.count_nonzero(codes == ord(",")))
    if values > max_values:
        raise FormatError(
            f"{shown}: too many values", expected=f"at most {max_values:,}", found=f"{values:,}"
        )
    depth = int(np.cumsum(steps[steps != 0], dtype=np.int32).max(initial=0))
    if depth > MAX_DEPTH:
        raise FormatError(
            f"{shown}: nested too deeply",
            expected=f"at most {MAX_DEPTH} levels",
            found=f"{depth:,}",
        )


def _check_surrogates(data: bytes, shown: str) -> None:
    """Half of an escaped surrogate pair makes a string that nothing can encode again."""
    if b"\\u" in data and _LONE_SURROGATE.search(data.replace(b"\\\\", b"")):
        raise FormatError(f"{shown}: is not valid Unicode", found="half of a surrogate pair")


class _Reader:
    """The hooks of one parse; each raises FormatError naming the document."""

    def __init__(self, shown: str) -> None:
        self.shown = shown

    def pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise FormatError(f"{self.shown}: the key {quoted(key)} appears twice")
                seen.add(key)
        return result

    def integer(self, digits: str) -> int:
        if len(digits) > _INTEGER_DIGITS or not -(1 << 63) <= (value := int(digits)) < 1 << 64:
            raise FormatError(
                f"{self.shown}: integer",
                expected="at most 64 bits",
                found=f"{quoted(digits, 24)} ({len(digits):,} characters)",
            )
        return value

    def number(self, digits: str) -> float:
        if len(digits) > _FLOAT_DIGITS or not math.isfinite(value := float(digits)):
            raise FormatError(
                f"{self.shown}: number", expected="a finite number", found=quoted(digits, 24)
            )
        return value

    def constant(self, name: str) -> NoReturn:
        raise FormatError(f"{self.shown}: number", expected="a finite number", found=name)
