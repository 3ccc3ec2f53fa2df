"""Which of the experts a tier holds is worth least, without looking at all of them every time."""

from typing import Final

import numpy as np

from localr1.experts.batched import Floats, Keys
from localr1.experts.policy import Ranking

LISTED: Final = 32
"""Least number of experts on the list."""
LISTED_SHARE: Final = 64
"""One in so many of the experts held is on the list, where that is more."""
PASSES: Final = 8
"""After so many, at most, the list is made anew, for scores fall by themselves."""
HELD_A_PASS: Final = 512
"""Experts held for each of those passes: looking at few costs nothing."""
LONGEST: Final = 8
"""Times as many on the list as it began with, when so many came in since."""


class Victims:
    """A list of the experts with the lowest scores, and of those that came in since.

    A score rises only when its expert is chosen. So those of the list that were not chosen since
    it was made are still worth no more than any that is not listed; and so is, when it is scored
    again, what is no higher than the highest then was.

    exact: never go by an old list.
    """

    def __init__(self, ranking: Ranking, exact: bool) -> None:
        self._ranking = ranking
        self._exact = exact
        self._keys: Keys = np.empty(0, np.int64)
        self._came: list[int] = []
        self._on_list: set[int] = set()
        self._limit = -np.inf
        self._longest = LONGEST * LISTED
        self._good_until = 0
        self.listed_in = 0
        """The pass that ran, or was about to, when the list was made."""
        self.order: list[tuple[int, float]] = []
        """(key, score) when the list was made, ascending. To be emptied from the front."""

    @property
    def is_old(self) -> bool:
        return (
            self._exact
            or self._ranking.passes >= self._good_until
            or len(self._on_list) > self._longest
        )

    def came(self, key: int) -> None:
        """The tier holds it from now on."""
        if key not in self._on_list:
            self._on_list.add(key)
            self._came.append(key)

    def list_anew(self, held: Keys) -> None:
        """held: all keys of the tier, those too that may not go now."""
        count = max(LISTED, len(held) // LISTED_SHARE)
        passes = min(1 + len(held) // HELD_A_PASS, PASSES)
        self._good_until = self._ranking.passes + passes
        scores = self._ranking.score(held)
        self._limit = np.inf
        if count < len(held):
            lowest = np.argpartition(scores, count - 1)[:count]
            held, scores = held[lowest], scores[lowest]
            self._limit = float(scores.max())
        self._keys, self.order = held, _ascending(held, scores)
        self._on_list = set(held.tolist())
        self._came, self.listed_in = [], self._ranking.passes
        self._longest = LONGEST * max(len(held), LISTED)

    def listed(self) -> Keys:
        """Distinct; some may have gone since, or may not go now."""
        if self._came:
            self._keys = np.concatenate([self._keys, np.array(self._came, np.int64)])
            self._came = []
        return self._keys

    def ranked(self, held: Keys) -> list[tuple[int, float]]:
        """(key, score now), ascending. held: those of `listed` that the tier still holds."""
        scores = self._ranking.score(held)
        below = scores <= self._limit
        return _ascending(held[below], scores[below])


def _ascending(keys: Keys, scores: Floats) -> list[tuple[int, float]]:
    order = np.argsort(scores, kind="stable")
    return list(zip(keys[order].tolist(), scores[order].tolist(), strict=True))
