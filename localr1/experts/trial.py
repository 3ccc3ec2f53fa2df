"""Something that may or may not pay, kept on or off by what was measured. Pure Python."""

from typing import Final

BLOCK: Final = 8
"""Measurements in a row of the same kind: what was switched acts on those that follow."""
EXPLORE: Final = 8
"""Blocks of the better kind between two of the other."""
MEMORY: Final = 0.7
MARGIN: Final = 0.02
"""The share by which being on must be cheaper: what pays nothing is off."""


class Trial:
    """Cost is a number a measurement, the less the better, such as seconds a token.

    Alternates blocks of on and off until both were measured, then stays with the better and tries
    the other now and then, as what pays changes with the conversation.
    """

    def __init__(self) -> None:
        self.is_on = True
        self._costs: dict[bool, float] = {}
        self._sum, self._count, self._blocks = 0.0, 0, 0

    @property
    def pays(self) -> bool:
        """As far as is known; True before anything is."""
        if len(self._costs) < 2:
            return True
        return self._costs[True] < (1.0 - MARGIN) * self._costs[False]

    def measured(self, cost: float) -> None:
        """With `is_on` as it was."""
        self._count += 1
        if self._count > 1:  # The first still feels what was before.
            self._sum += cost
        if self._count < BLOCK:
            return
        mean = self._sum / (self._count - 1)
        before = self._costs.get(self.is_on)
        self._costs[self.is_on] = mean if before is None else MEMORY * before + (1 - MEMORY) * mean
        self._sum, self._count = 0.0, 0
        self._blocks += 1
        if len(self._costs) < 2:
            self.is_on = not self.is_on
        else:
            self.is_on = self.pays == (self._blocks % EXPLORE != 0)
