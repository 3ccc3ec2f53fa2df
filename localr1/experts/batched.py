"""A pass's choices, gathered and applied in one numpy step (policy.py says what keys and passes
are)."""

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.int64]
Floats = NDArray[np.float64]


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
        self.version = 0
        self.chosen: Keys = np.empty(0, np.int64)
        self._layers: list[int] = []
        self._experts: list[Keys] = []
        self._weights: list[Floats | None] = []
        self._is_weighted = False
        self._applied: list[tuple[Keys, Floats | None]] = []
        # First keys of the layers of a decoded token, whose passes all have the same form.
        self._form: tuple[list[int], int] | None = None
        self._offsets: Keys = self.chosen

    @property
    def num_keys(self) -> int:
        return self.num_layers * self.num_experts

    def observe(self, layer: int, experts: Keys, weights: Floats | None = None) -> None:
        self.version += 1
        self._layers.append(layer)
        self._experts.append(experts)
        self._weights.append(weights)
        if weights is not None:
            self._is_weighted = True

    def tick(self, tokens: int | None = None) -> None:
        self.version += 1
        self._apply_pending()
        applied, self._applied = self._applied, []
        keys, weights = _joined(applied)
        self.chosen = keys
        if tokens is None:
            tokens = 1 if weights is None or not len(weights) else max(1, int(weights.max()))
        self._end_pass(keys, weights, tokens)

    @property
    def scores(self) -> Floats:
        self._apply_pending()
        return self._score(None).reshape(self.num_layers, self.num_experts)

    def score(self, keys: Keys) -> Floats:
        self._apply_pending()
        return self._score(keys)

    def _apply_pending(self) -> None:
        if not self._layers:
            return
        keys = np.concatenate(self._experts) + self._first_keys(sum(map(len, self._experts)))
        weights = None
        if self._is_weighted:
            weights = np.concatenate(
                [
                    np.ones(len(experts)) if given is None else given
                    for experts, given in zip(self._experts, self._weights, strict=True)
                ]
            )
        self._layers, self._experts, self._weights, self._is_weighted = [], [], [], False
        self._applied.append((keys, weights))
        self._apply(keys, weights)

    def _first_keys(self, count: int) -> Keys:
        """int64 [count]: the first key of the layer that each pending choice belongs to."""
        per_layer = len(self._experts[0])
        uniform = per_layer * len(self._layers) == count and all(
            len(experts) == per_layer for experts in self._experts
        )
        if uniform and self._form == (self._layers, per_layer):
            return self._offsets
        sizes = [len(experts) for experts in self._experts]
        offsets = np.repeat(np.array(self._layers, np.int64) * self.num_experts, sizes)
        if uniform:
            self._form, self._offsets = (self._layers, per_layer), offsets
        return offsets

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
