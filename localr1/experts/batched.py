"""A pass's choices, gathered and applied in one numpy step (policy.py says what keys and passes
are)."""

from collections.abc import Sequence
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.int64]
Floats = NDArray[np.float64]
NEVER: Final = -(1 << 30)
"""Pass of the last use of what was not used."""


class Batched:
    """What rankings share: a pass's choices are gathered, and applied in one numpy step when the
    pass is over or a score is asked for. Every layer by itself would cost more than the rest.

    A subclass changes its state in `_apply`, and in `_end_pass` if it must know the whole pass.
    """

    horizon: float = float("inf")

    def __init__(self, num_layers: int, num_experts: int) -> None:
        assert num_layers > 0
        assert num_experts > 0
        self.num_layers, self.num_experts = num_layers, num_experts
        self.passes = 0
        self._seen = 0
        self.chosen: Keys = np.empty(0, np.int64)
        self.last_pass: Keys = np.full(self.num_keys, NEVER, np.int64)
        # A layer, and what was chosen in it, in turns: the cheapest thing to keep.
        self._pending: list[Any] = []
        self._weights: list[tuple[int, Floats]] = []
        self._applied: list[tuple[Keys, Floats | None]] = []
        # Choices of a token in a layer, and the first key of the layer of each of all its choices.
        self._per_layer = 0
        self._first_keys: Keys = self.chosen

    @property
    def num_keys(self) -> int:
        return self.num_layers * self.num_experts

    def observe(self, layer: int, experts: Keys, weights: Floats | None = None) -> None:
        if weights is not None:
            self._weights.append((len(self._pending) // 2, weights))
        self._pending += layer, experts

    def observe_layers(self, first: int, rows: Sequence[Keys]) -> None:
        self._apply_pending()
        # A third of what np.concatenate takes.
        chosen = np.frombuffer(b"".join(cast("Sequence[memoryview]", rows)), np.int64)
        per_layer = len(chosen) // len(rows)
        if per_layer != self._per_layer:
            self._per_layer = per_layer
            self._first_keys = np.repeat(np.arange(self.num_layers) * self.num_experts, per_layer)
        begin = first * per_layer
        self._add(chosen + self._first_keys[begin : begin + len(chosen)], None)
        self._seen += 1

    def tick(self, tokens: int | None = None) -> None:
        self._apply_pending()
        applied, self._applied = self._applied, []
        keys, weights = _joined(applied)
        self.chosen = keys
        if tokens is None:
            tokens = 1 if weights is None or not len(weights) else max(1, int(weights.max()))
        self.passes += 1
        self._seen += 1
        self._end_pass(keys, weights, tokens)

    @property
    def version(self) -> int:
        return self._seen + len(self._pending)

    @property
    def scores(self) -> Floats:
        self._apply_pending()
        return self._score(None).reshape(self.num_layers, self.num_experts)

    def score(self, keys: Keys) -> Floats:
        self._apply_pending()
        return self._score(keys)

    @property
    def chosen_scores(self) -> Floats:
        return self.score(self.chosen)

    def _apply_pending(self) -> None:
        if not self._pending:
            return
        experts: list[Keys] = self._pending[1::2]
        sizes = list(map(len, experts))
        keys = np.concatenate(experts)
        keys += np.repeat(np.array(self._pending[0::2], np.int64) * self.num_experts, sizes)
        weights = None
        if self._weights:
            of_layers = [np.ones(size) for size in sizes]
            for place, given in self._weights:
                of_layers[place] = given
            weights = np.concatenate(of_layers)
        self._seen += len(self._pending)
        self._pending, self._weights = [], []
        self._add(keys, weights)

    def _add(self, keys: Keys, weights: Floats | None) -> None:
        self._applied.append((keys, weights))
        self.last_pass[keys] = self.passes
        self._apply(keys, weights)

    def _apply(self, keys: Keys, weights: Floats | None) -> None:
        """Some layers' choices of the running pass."""

    def _end_pass(self, keys: Keys, weights: Floats | None, tokens: int) -> None:
        """All of the pass's choices, applied before."""

    def _score(self, keys: Keys | None) -> Floats:
        """Of these keys, or of all."""
        raise NotImplementedError


def _joined(pieces: list[tuple[Keys, Floats | None]]) -> tuple[Keys, Floats | None]:
    if len(pieces) == 1:
        return pieces[0]
    if not pieces:
        return np.empty(0, np.int64), None
    keys = np.concatenate([keys for keys, _ in pieces])
    if all(weights is None for _, weights in pieces):
        return keys, None
    return keys, np.concatenate(
        [np.ones(len(keys)) if weights is None else weights for keys, weights in pieces]
    )
