"""GGUF metadata with typed access: a key of the wrong type is an error naming both types."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from localr1.checkpoint.paths import quoted
from localr1.errors import ConfigError, FormatError

MAX_SIZE = 1 << 30
"""Of a model: beyond any, so that a corrupt number is an error that names it."""


class Metadata:
    """The key/value pairs of one file. shown: how messages call the file.

    Each reader returns `default` when the key is absent, and raises FormatError when it is absent
    without a default or of another type.
    """

    def __init__(self, shown: str, values: dict[str, Any]) -> None:
        self.shown = shown
        self._values = values

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def integer(self, key: str, default: int | None = None) -> int:
        value: int = self._get(key, default, "an integer", lambda value: type(value) is int)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite float. A float32 is given as the shortest decimal that means it: 1e-05, not
        9.999999747378752e-06, so that a rebuilt config reads like the original."""
        value = self._get(
            key, default, "a finite number", lambda v: type(v) in (int, float) and math.isfinite(v)
        )
        with np.errstate(over="ignore"):
            single = np.float32(value)
        return float(str(single)) if float(single) == value else float(value)

    def string(self, key: str, default: str | None = None) -> str:
        value: str = self._get(key, default, "a string", lambda value: type(value) is str)
        return value

    def boolean(self, key: str, default: bool | None = None) -> bool:
        value: bool = self._get(key, default, "a bool", lambda value: type(value) is bool)
        return value

    def strings(self, key: str, default: list[str] | None = None) -> list[str]:
        # Only an array of strings is kept as a list; the others are numpy arrays.
        values: list[str] = self._get(
            key, default, "an array of strings", lambda value: type(value) is list
        )
        return values

    def integers(self, key: str, default: list[int] | None = None) -> list[int]:
        values = self._get(
            key,
            default,
            "an array of integers",
            lambda v: isinstance(v, np.ndarray) and v.dtype.kind in "iu",
        )
        return values if isinstance(values, list) else values.tolist()

    def numbers(self, key: str, default: list[float] | None = None) -> list[float]:
        values = self._get(
            key,
            default,
            "an array of finite numbers",
            lambda v: (
                isinstance(v, np.ndarray) and v.dtype.kind == "f" and bool(np.isfinite(v).all())
            ),
        )
        return values if isinstance(values, list) else values.tolist()

    def uniform_integer(self, key: str, default: int | None = None) -> int:
        """An integer, or an array with one per layer that are all the same."""
        if isinstance(self._values.get(key), np.ndarray):
            values = set(self.integers(key))
            if len(values) != 1:
                raise FormatError(
                    f"{self.shown}: {key}",
                    expected="the same value for every layer",
                    found=quoted(sorted(values)),
                )
            return values.pop()
        return self.integer(key, default)

    def size(
        self, key: str, largest: int = MAX_SIZE, *, smallest: int = 1, default: int | None = None
    ) -> int:
        """A `uniform_integer` within bounds; else ConfigError."""
        value = self.uniform_integer(key, default)
        if not smallest <= value <= largest:
            raise ConfigError(
                f"{self.shown}: metadata {key}",
                expected=f"{smallest:,} to {largest:,}",
                found=f"{value:,}",
            )
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A `number` above 0; else ConfigError."""
        value = self.number(key, default)
        if value <= 0:
            raise ConfigError(f"{self.shown}: metadata {key}", expected="above 0", found=value)
        return value

    def _get(self, key: str, default: Any, expected: str, accepts: Any) -> Any:
        if key not in self._values:
            if default is None:
                raise FormatError(f"{self.shown}: metadata {key} is missing", expected=expected)
            return default
        value = self._values[key]
        if not accepts(value):
            raise FormatError(
                f"{self.shown}: metadata {key}", expected=expected, found=_describe(value)
            )
        return value


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    if isinstance(value, list):
        return "an array of strings"
    words = {str: "a string", bool: "a bool", int: "an integer", float: "a float"}
    return f"{words[type(value)]} {quoted(value)}"
