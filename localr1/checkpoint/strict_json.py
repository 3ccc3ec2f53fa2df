"""JSON from strangers: bounded before it is parsed, and without JSON's ambiguities.

Refused beyond what the `json` module refuses: too large, too deep, too many values, duplicate keys,
NaN and Infinity in any spelling (1e999 too), integers beyond 64 bits, lone surrogates.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from localr1.checkpoint.files import decode_utf8, read_bounded
from localr1.checkpoint.paths import quoted
from localr1.errors import FormatError

MAX_BYTES = 16 << 20
MAX_DEPTH = 64
MAX_VALUES = 2_000_000
"""Commas and opening brackets. A hostile value costs some 100 bytes of memory, so this bounds the
parsed document at about 200 MB however it is built."""

_INTEGER_DIGITS = 20
_FLOAT_DIGITS = 400

_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_STRING = re.compile(rb'"[^"]*"?')
_NOT_STRUCTURE = bytes(sorted(set(range(256)) - set(b"[]{},")))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_UNICODE_ESCAPE = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)

T = TypeVar("T")


def parse_json(
    data: bytes, shown: str, *, max_bytes: int = MAX_BYTES, max_values: int = MAX_VALUES
) -> Any:
    """`data` as a document. shown: how messages call it. Raises FormatError, nothing else."""
    if len(data) > max_bytes:
        raise FormatError(
            f"{shown}: too large", expected=f"at most {max_bytes:,} bytes", found=f"{len(data):,}"
        )
    text = decode_utf8(data, shown)
    _check_structure(data, shown, max_values)
    _check_surrogates(data, shown)
    reader = _Reader(shown)
    try:
        return json.loads(
            text,
            object_pairs_hook=reader.pairs,
            parse_int=reader.integer,
            parse_float=reader.number,
            parse_constant=reader.constant,
        )
    except json.JSONDecodeError as error:
        raise FormatError(
            f"{shown}: is not valid JSON",
            found=f"{error.msg} at line {error.lineno}, column {error.colno}",
        ) from error


def parse_object(
    data: bytes, shown: str, *, max_bytes: int = MAX_BYTES, max_values: int = MAX_VALUES
) -> dict[str, Any]:
    """As `parse_json`, for a document that must be an object."""
    document = parse_json(data, shown, max_bytes=max_bytes, max_values=max_values)
    if not isinstance(document, dict):
        raise FormatError(shown, expected="a JSON object", found=kind_of(document))
    return document


def read_object(
    path: Path, shown: str, *, max_bytes: int = MAX_BYTES, max_values: int = MAX_VALUES
) -> dict[str, Any]:
    """The JSON object in a file."""
    return parse_object(
        read_bounded(path, shown, max_bytes), shown, max_bytes=max_bytes, max_values=max_values
    )


def required(values: Mapping[str, Any], key: str, kind: type[T], shown: str) -> T:
    """values[key], which must be there and be a `kind` (true is not an integer)."""
    if key not in values:
        raise FormatError(f"{shown}: {key} is missing", expected=_KINDS.get(kind, kind.__name__))
    return expect(values[key], kind, f"{shown}: {key}")


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


def _check_structure(data: bytes, shown: str, max_values: int) -> None:
    """Bound depth and number of values by linear scans, so that parsing can exhaust nothing."""
    bare = _ESCAPE.sub(b"", data) if b"\\" in data else data
    structure = _STRING.sub(b"", bare).translate(None, _NOT_STRUCTURE)
    opened = structure.count(b"[") + structure.count(b"{")
    values = opened + structure.count(b",")
    if values > max_values:
        raise FormatError(
            f"{shown}: too many values", expected=f"at most {max_values:,}", found=f"{values:,}"
        )
    if opened <= MAX_DEPTH:
        return
    if len(structure) > values + opened:
        raise FormatError(f"{shown}: is not valid JSON", found="more brackets closed than opened")
    codes = np.frombuffer(structure, dtype=np.uint8)
    steps = np.zeros(len(codes), dtype=np.int32)
    steps[(codes == ord("[")) | (codes == ord("{"))] = 1
    steps[(codes == ord("]")) | (codes == ord("}"))] = -1
    depth = int(np.cumsum(steps).max())
    if depth > MAX_DEPTH:
        raise FormatError(
            f"{shown}: nested too deeply",
            expected=f"at most {MAX_DEPTH} levels",
            found=f"{depth:,}",
        )


def _check_surrogates(data: bytes, shown: str) -> None:
    """A \\ud83d without its second half makes a string that nothing can encode again."""
    if not _SURROGATE.search(data):
        return
    expected_at: int | None = None  # Where the low half must start, after a high half.
    for match in _UNICODE_ESCAPE.finditer(data):
        code = int(match[1], 16) if match[1] else 0
        is_low = 0xDC00 <= code <= 0xDFFF
        if is_low != (expected_at is not None) or expected_at not in (None, match.start()):
            break
        expected_at = match.end() if 0xD800 <= code <= 0xDBFF else None
    else:
        if expected_at is None:
            return
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
