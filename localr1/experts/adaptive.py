"""The ranking localr1 keeps experts by: recency with decayed frequency, weighed by what proved to
predict the next uses in this model and this conversation."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from localr1.experts.batched import Batched, Floats, Keys

HALF_LIVES: Final = (6.0, 32.0, 200.0, float("inf"))
"""Tokens after which a use counts half, of the frequencies that are kept."""
MAX_AGE: Final = 512
"""Tokens since the last use from which on more make no difference."""
NUM_BENDS: Final = 10
"""Ages 1, 2, 4, ... MAX_AGE, between which the effect of recency is a straight line in log age."""
WINDOW: Final = 8
"""Tokens whose uses are predicted."""
MAX_WAIT: Final = 2
"""Tokens between windows, at random up to this: else text in rows of a window's length would show
every window the same."""
SAMPLE: Final = 1024
"""Experts a window learns from, at most: a model of R1's size has more than are needed."""
MEMORY: Final = 0.99
"""What a window still counts when the next is learned."""
FLOOR: Final = 0.05
"""Of the mean rate of use: rates below it are told apart no further."""
PULL: Final = 1e-4
"""Towards FIRST_WEIGHTS, as a share of the mean square of what is learned from."""
FIRST_WEIGHTS: Final = np.concatenate(
    [1 / (1 + 2.0 ** np.arange(NUM_BENDS)), np.full(len(HALF_LIVES), 1 / len(HALF_LIVES))]
)
"""Before anything was learned."""
RESCALE: Final = 1e100


def _bends() -> Floats:
    """[MAX_AGE + 1, NUM_BENDS]: how much of each bend's weight an age gets. Age 0, a use in the
    running pass, is as age 1."""
    place = np.log2(np.arange(MAX_AGE + 1).clip(min=1))
    bends: Floats = np.maximum(0.0, 1.0 - np.abs(place[:, None] - np.arange(NUM_BENDS)))
    return bends


BENDS: Final = _bends()
DECAY: Final = 0.5 ** (1 / np.array(HALF_LIVES))


def _mean_decay(tokens: int) -> Floats:
    """[len(HALF_LIVES)]: what one of the last `tokens` uses counts on average."""
    if tokens == 1:
        return np.ones(len(DECAY))
    means: Floats = np.array([decay ** np.arange(tokens) for decay in DECAY]).mean(axis=1)
    return means


class Adaptive(Batched):
    """The score is the expected uses a token over the next WINDOW tokens.

    It is linear in the frequencies of HALF_LIVES and piecewise linear in the logarithm of the time
    since the last use. The weights are learned while running, by weighted least squares over past
    windows: the error of a rate counts in proportion to it, as counts vary, so that what matters
    little used experts, among which a large cache must choose, is learned as well as what matters
    the busiest. Neither recency nor frequency is right for every model: LRU and LFU are both
    among what can be learned.
    """

    name: Final = "adaptive"
    horizon: float = 4.0 * WINDOW

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._clock = 0
        self._last = np.full(self.num_keys, -MAX_AGE, np.int64)
        # Decayed sums of uses, each times its scale: what grows is what is added, so that a token
        # costs nothing for the experts it did not choose.
        self._sums = np.zeros((self.num_keys, len(HALF_LIVES)))
        self._scale = np.ones(len(HALF_LIVES))
        # Sum of the weights that a sum would have if the expert were used once by every token.
        self._total = np.zeros(len(HALF_LIVES))
        self._learned = FIRST_WEIGHTS.copy()
        self._by_age = BENDS @ self._learned[:NUM_BENDS]
        size = len(FIRST_WEIGHTS)
        self._squares, self._products = np.zeros((size, size)), np.zeros(size)
        self._random = np.random.default_rng(0)
        self._window: _Window | None = None
        self._wait = 0

    def _apply(self, keys: Keys, weights: Floats | None) -> None:
        self._last[keys] = self._clock

    def _end_pass(self, keys: Keys, weights: Floats | None, tokens: int) -> None:
        # As if the uses were spread evenly over the pass's tokens.
        spread = _mean_decay(tokens)
        self._clock += tokens
        if tokens == 1:
            self._scale /= DECAY
        else:
            self._sums *= DECAY**tokens
            uses = 1.0 if weights is None else weights
            self._last[keys] = self._clock - np.maximum(tokens / (uses + 1.0), 1.0)
            self._window = None
        self._total = self._total * DECAY**tokens + spread * tokens
        added = self._scale * spread
        self._sums[keys] += added if weights is None else weights[:, None] * added
        if self._scale.max() > RESCALE:
            self._sums /= self._scale
            self._scale[:] = 1.0
        if self._window is not None and self._clock >= self._window.begin + WINDOW:
            self._learn(self._window)
            self._window = None
            self._wait = int(self._random.integers(MAX_WAIT + 1))
        if self._window is None:
            self._wait -= 1
            if self._wait < 0:
                self._open_window()

    def _score(self, keys: Keys | None) -> Floats:
        last, sums = self._last, self._sums
        if keys is not None:
            last, sums = last[keys], sums[keys]
        age = np.minimum(self._clock - last, MAX_AGE)
        scores: Floats = self._by_age[age] + sums @ (self._learned[NUM_BENDS:] / self._per_token)
        return scores

    @property
    def _per_token(self) -> Floats:
        """What the sums of an expert that every token used would be."""
        per_token: Floats = self._scale * self._total.clip(min=1.0)
        return per_token

    def _open_window(self) -> None:
        keys = np.arange(self.num_keys)
        if self.num_keys > SAMPLE:
            keys = self._random.integers(0, self.num_keys, SAMPLE)
        sums = self._sums[keys]
        age = np.minimum(self._clock - self._last[keys], MAX_AGE)
        features = np.concatenate([BENDS[age], sums / self._per_token], axis=1)
        self._window = _Window(self._clock, keys, features, sums[:, -1])

    def _learn(self, window: "_Window") -> None:
        uses = (self._sums[window.keys, -1] - window.uses) / (self._clock - window.begin)
        expected = np.maximum(window.features @ self._learned, 0.0)
        weighted = window.features / (expected + FLOOR * uses.mean() + 1e-9)[:, None]
        self._squares = MEMORY * self._squares + weighted.T @ window.features
        self._products = MEMORY * self._products + weighted.T @ uses
        pull = PULL * np.trace(self._squares) / len(self._squares)
        self._learned = np.linalg.solve(
            self._squares + pull * np.eye(len(self._squares)),
            self._products + pull * FIRST_WEIGHTS,
        )
        self._by_age = BENDS @ self._learned[:NUM_BENDS]


@dataclass(frozen=True)
class _Window:
    """What was known when it began. begin: of the clock. features: [n, NUM_BENDS +
    len(HALF_LIVES)], what the weights are multiplied by. uses: [n], all so far."""

    begin: int
    keys: Keys
    features: Floats
    uses: Floats
