"""What came next the last time (Saxena 2023, "Prompt lookup decoding"): a draft of the coming
tokens that costs no model. Pure Python."""

from collections.abc import Iterable
from typing import Final

LENGTHS: Final = (4, 3, 2)
"""Tokens that must have come before alike, the longest match first: it is right most often."""


class NgramIndex:
    """Of one growing sequence: where each run of tokens came last."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}

    def extend(self, ids: Iterable[int]) -> None:
        for identifier in ids:
            # A run is known once something follows it; so the end of the sequence never finds
            # itself.
            for length in LENGTHS:
                if len(self._ids) >= length:
                    self._ends[tuple(self._ids[-length:])] = len(self._ids)
            self._ids.append(identifier)

    def propose(self, count: int) -> tuple[int, list[int]]:
        """(how many tokens at the end of the sequence came before alike, at most `count` tokens
        that followed them then); (0, []) where they are new."""
        for length in LENGTHS:
            if len(self._ids) >= length:
                end = self._ends.get(tuple(self._ids[-length:]))
                if end is not None:
                    return length, self._ids[end : end + count]
        return 0, []
