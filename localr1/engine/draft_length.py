"""How many drafted tokens a pass should compute along, by what was measured. Pure Python.

A pass over more tokens takes longer, by how much depends on the machine and the model: little where
weights come from memory, all of it where the arithmetic is what takes the time.
"""

from typing import Final

LENGTHS: Final = (0, 1, 3, 7)
"""That are tried."""
TRIALS: Final = 3
"""Passes of each length before its cost is believed."""
EXPLORE: Final = 40
"""Choices between two of a length that is not thought the best."""
MEMORY: Final = 0.9
"""Of a measurement, what is left of it after the next."""
MARGIN: Final = 0.05
"""The share by which drafting must be faster: what pays nothing is off."""


class DraftLength:
    """costs: seconds of a pass with so many drafted tokens. acceptance: the share of drafted tokens
    that were right, each looked at only if those before it were."""

    def __init__(self) -> None:
        self.costs: dict[int, float] = {}
        self.acceptance = 0.5
        self._trials = dict.fromkeys(LENGTHS, 0)
        self._choices = 0

    @property
    def best(self) -> int:
        """As far as is known; 0 where drafting does not pay."""
        plain = self.costs.get(0)
        if plain is None:
            return 0
        speeds = {
            length: self._expected_tokens(length) / cost for length, cost in self.costs.items()
        }
        best = max(speeds, key=lambda length: speeds[length])
        return best if speeds[best] > (1.0 + MARGIN) * speeds[0] else 0

    def choose(self) -> int:
        """For the next pass for which there is a draft."""
        self._choices += 1
        for length in LENGTHS:
            if self._trials[length] < TRIALS:
                return length
        best = self.best
        if self._choices % EXPLORE:
            return best
        # What pays changes with the text and with what else the machine does.
        others = [length for length in LENGTHS if length != best]
        return others[self._choices // EXPLORE % len(others)]

    def measured(self, length: int, seconds: float) -> None:
        """A pass with so many drafted tokens took so long; lengths that are not tried, as where
        less was found to draft, say nothing."""
        if length not in self._trials:
            return
        self._trials[length] += 1
        before = self.costs.get(length)
        # The first pass of its kind feels memory that it is the first to use.
        if before is None or self._trials[length] == TRIALS - 1:
            before = seconds
        self.costs[length] = MEMORY * before + (1 - MEMORY) * seconds

    def judged(self, was_right: bool) -> None:
        """A drafted token, those before it being right, was right or wrong."""
        self.acceptance = MEMORY * self.acceptance + (1 - MEMORY) * was_right

    def _expected_tokens(self, length: int) -> float:
        """That a pass gives: one, and each drafted one if all before it are right."""
        return sum(self.acceptance**power for power in range(length + 1))
