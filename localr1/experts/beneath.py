"""What experts are worth to a tier beneath the device. Pure numpy, no torch."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from localr1.experts.batched import Floats, Keys
from localr1.experts.policy import WORTHLESS, Ranking

DUPLICATE: Final = WORTHLESS
"""What the device holds is read from there, so that its copy in RAM is the first to make room.
Should the device drop it, it is copied back where it is worth its slot (hot.py)."""


class Beneath:
    """A Ranking that follows another, which is told what passes choose.

    on_device: bool [num_layers, num_experts], changed by its owner.
    """

    def __init__(self, ranking: Ranking, on_device: NDArray[np.bool_]) -> None:
        self._ranking = ranking
        self._on_device = on_device.reshape(-1)
        self._shape = on_device.shape
        self._changes = 0

    def moved(self) -> None:
        """The owner changed on_device."""
        self._changes += 1

    @property
    def version(self) -> int:
        return self._ranking.version + self._changes

    @property
    def passes(self) -> int:
        return self._ranking.passes

    @property
    def last_pass(self) -> Keys:
        return self._ranking.last_pass

    @property
    def name(self) -> str:
        return self._ranking.name

    @property
    def horizon(self) -> float:
        return self._ranking.horizon

    def observe(self, layer: int, experts: Keys, weights: Floats | None = None) -> None:
        """Nothing: the other ranking was told."""

    def observe_layers(self, first: int, rows: Sequence[Keys]) -> None:
        """Nothing: the other ranking was told."""

    def tick(self, tokens: int | None = None) -> None:
        """Nothing: the other ranking was told."""

    @property
    def scores(self) -> Floats:
        scores = self._ranking.scores
        return np.where(self._on_device.reshape(self._shape), DUPLICATE, scores)

    def score(self, keys: Keys) -> Floats:
        return np.where(self._on_device[keys], DUPLICATE, self._ranking.score(keys))

    @property
    def chosen(self) -> Keys:
        return self._ranking.chosen

    @property
    def chosen_scores(self) -> Floats:
        return self.score(self._ranking.chosen)
