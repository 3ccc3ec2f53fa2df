"""What routers chose, as the store looks at it: chosen int64 [T, k]."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localr1.experts.policy import Ranking


def distinct(chosen: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The experts, and how many tokens chose each. A token's are distinct."""
    values = chosen.numpy()
    if len(values) == 1:
        return values[0], np.ones(values.shape[1], np.int64)
    return np.unique(values, return_counts=True)


class PassChoices:
    """What the running pass chose, gathered layer by layer. Of a token it is told at once: to tell
    of every layer by itself takes longer than all else the policy does.

    counts: int64 [num_layers, num_experts], to which how many tokens chose each is added, of a
    token when it is told.
    """

    def __init__(self, counts: NDArray[np.int64]) -> None:
        self._counts = counts
        # Of a token: the first layer, and what was chosen in it and in those after it.
        self._first = 0
        self._rows: list[NDArray[np.int64]] = []
        # Of more: the layers, their distinct experts, and how many tokens chose each.
        self._chunks: list[tuple[int, NDArray[np.int64], NDArray[np.int64]]] = []

    def add(self, layer: int, chosen: Tensor) -> tuple[list[int], list[int]]:
        """The distinct experts, and how many tokens chose each. chosen: does not change until it
        was told. A token's layers come one after another, from any on that follows a `tell`."""
        values = chosen.numpy()
        if len(values) != 1:
            experts, counts = distinct(chosen)
            self._counts[layer, experts] += counts
            self._chunks.append((layer, experts, counts))
            return experts.tolist(), counts.tolist()
        one = self.add_token(layer, values[0])
        return one, [1] * len(one)

    def add_token(self, layer: int, chosen: NDArray[np.int64]) -> list[int]:
        """`add` of one token's experts [k], which are distinct and do not change."""
        if not self._rows:
            self._first = layer
        assert layer == self._first + len(self._rows), "a layer was left out"
        self._rows.append(chosen)
        experts: list[int] = chosen.tolist()
        return experts

    def tell(self, ranking: Ranking | None) -> None:
        """What was added since the last time; None: the counts alone."""
        chunks, self._chunks = self._chunks, []
        rows, self._rows = self._rows, []
        if rows:
            layers = np.arange(self._first, self._first + len(rows))[:, None]
            self._counts[layers, rows] += 1
        if ranking is None:
            return
        if rows:
            ranking.observe_layers(self._first, rows)
        for layer, experts, counts in chunks:
            ranking.observe(layer, experts, counts.astype(np.float64))


def only(chosen: Tensor, experts: Sequence[int], num_experts: int) -> Tensor:
    """chosen, with -1 for all but these experts."""
    kept = np.full(num_experts, False)
    kept[list(experts)] = True
    numbers = chosen.numpy()
    return torch.from_numpy(np.where(kept[numbers], numbers, -1))
