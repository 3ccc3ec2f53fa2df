"""How many drafted tokens a pass should compute along, by what was measured. Pure Python.

A pass over more tokens takes longer, by how much depends on the machine and the model: little where
weights come from memory, all of it where the arithmetic is what takes the time. And a draft is
right the more often, the longer the run of tokens that came before alike.
"""

import statistics
from collections import deque
from typing import Final

LENGTHS: Final = (0, 1, 3, 7)
"""That are tried, each once the one before it is known to pay or nearly so."""
TRIALS: Final = 2
"""Passes of each length before its cost is believed."""
REMEMBERED: Final = 5
"""Passes of each length whose median is its cost: one that something else delayed counts little."""
EXPLORE: Final = 64
"""Choices between two of a length beside the one that is thought the best."""
MEMORY: Final = 0.9
"""Of what was believed of a draft, what is left of it after the next."""
UNKNOWN: Final = 0.5
"""The share of drafted tokens that is believed to be right before any was judged."""
MARGIN: Final = 0.15
"""The share by which its passes must be faster: what pays less is lost beside them."""


class DraftLength:
    """A run is how many tokens came before alike (ngrams.py)."""

    def __init__(self) -> None:
        self._times: dict[int, deque[float]] = {each: deque(maxlen=REMEMBERED) for each in LENGTHS}
        self._right: dict[int, float] = {}
        self._choices = 0

    def acceptance(self, run: int) -> float:
        """The share of drafted tokens that were right, each looked at only if those before it
        were."""
        return self._right.get(run, UNKNOWN)

    def cost(self, length: int) -> float | None:
        """Seconds of a pass with so many drafted tokens, where enough were measured."""
        times = self._times[length]
        return statistics.median(times) if len(times) >= TRIALS else None

    def best(self, run: int) -> int:
        """As far as is known; 0 where drafting does not pay."""
        plain = self.cost(0)
        if plain is None:
            return 0
        best, speed = 0, (1.0 + MARGIN) / plain
        for length in LENGTHS[1:]:
            cost = self.cost(length)
            if cost is not None and self._expected_tokens(run, length) / cost > speed:
                best, speed = length, self._expected_tokens(run, length) / cost
        return best

    def choose(self, run: int) -> int:
        """For the next pass, where there is a draft."""
        self._choices += 1
        plain, before = self.cost(0), 0.0
        for length in LENGTHS:
            cost = self.cost(length)
            if cost is not None:
                before = cost
            elif plain is None or self._expected_tokens(run, length) / before > 1.0 / plain:
                return length  # It cannot cost less than the one before it, but may pay.
            else:
                break
        best = self.best(run)
        if self._choices % EXPLORE:
            return best
        # What pays changes with the text and with what else the machine does.
        place = LENGTHS.index(best)
        beside = [*LENGTHS[max(place - 1, 0) : place], *LENGTHS[place + 1 : place + 2]]
        return beside[self._choices // EXPLORE % len(beside)]

    def measured(self, length: int, seconds: float) -> None:
        """A pass with so many drafted tokens took so long; lengths that are not tried, as where
        less was found to draft, say nothing."""
        if length in self._times:
            self._times[length].append(seconds)

    def judged(self, run: int, was_right: bool) -> None:
        """A drafted token, those before it being right, was right or wrong."""
        self._right[run] = MEMORY * self.acceptance(run) + (1 - MEMORY) * was_right

    def _expected_tokens(self, run: int, length: int) -> float:
        """That a pass gives: one, and each drafted one if all before it are right."""
        return sum(self.acceptance(run) ** power for power in range(length + 1))
