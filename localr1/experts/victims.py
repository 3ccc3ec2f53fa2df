"""Which of the experts a tier holds is worth least, without looking at all of them every time."""

from typing import Final

import numpy as np

from localr1.experts.batched import Keys
from localr1.experts.policy import Ranking

LISTED: Final = 32
"""Least number of experts on the list."""
LISTED_SHARE: Final = 64
"""One in so many of the experts held is on the list, where that is more."""
PASSES: Final = 8
"""After so many the list is made anew, for scores fall by themselves."""
LONGEST: Final = 8
"""Times as many on the list as it began with, when so many came in since."""


class Victims:
    """A list of the experts with the lowest scores, and of those that came in since.

    An expert whose score is still no higher than the highest was when the list was made is worth no
    more than any that is not listed. exact: never go by an old list.
    """

    def __init__(self, ranking: Ranking, exact: bool) -> None:
        self._ranking = ranking
        self._exact = exact
        self._keys: Keys = np.empty(0, np.int64)
        self._came: list[int] = []
        self._limit = -np.inf
        self._passes = 0
        self._listed = 0

    @property
    def is_old(self) -> bool:
        too_long = len(self._keys) + len(self._came) > LONGEST * max(self._listed, LISTED)
        return self._exact or self._passes >= PASSES or too_long

    def end_pass(self) -> None:
        self._passes += 1

    def came(self, key: int) -> None:
        """The tier holds it from now on."""
        self._came.append(key)

    def list_anew(self, held: Keys) -> None:
        """held: all keys of the tier, those too that may not go now."""
        count = max(LISTED, len(held) // LISTED_SHARE)
        self._keys, self._limit = held, np.inf
        if count < len(held):
            scores = self._ranking.score(held)
            lowest = np.argpartition(scores, count - 1)[:count]
            self._keys, self._limit = held[lowest], float(scores[lowest].max())
        self._came, self._passes, self._listed = [], 0, count

    def listed(self) -> Keys:
        """Distinct; some may have gone since, or may not go now."""
        if self._came:
            self._keys = np.unique(np.concatenate([self._keys, np.array(self._came, np.int64)]))
            self._came = []
        return self._keys

    def ranked(self, held: Keys) -> list[tuple[int, float]]:
        """(key, score), ascending. held: those of `listed` that the tier still holds."""
        scores = self._ranking.score(held)
        order = np.argsort(scores, kind="stable")
        keys, values = held[order], scores[order]
        count = int(np.searchsorted(values, self._limit, side="right"))
        return list(zip(keys[:count].tolist(), values[:count].tolist(), strict=True))
