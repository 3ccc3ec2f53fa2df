"""The ranking localr1 keeps experts by: recency with decayed frequency, weighed by what proved to
predict the next uses in this model and this conversation."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from localr1.experts.batched import Batched, Floats, Keys

Rows = NDArray[np.float32]

HALF_LIVES: Final = (6.0, 32.0, 200.0, float("inf"))
"""Tokens after which a use counts half, of the frequencies that are kept."""
MAX_AGE: Final = 4096
"""Passes since the last use from which on more make no difference."""
NUM_BENDS: Final = 13
"""Ages 1, 2, 4, ... MAX_AGE, between which the effect of recency is a straight line in log age."""
WINDOW: Final = 4
"""Tokens whose uses are predicted."""
MAX_WAIT: Final = 2
LONG_WAIT: Final = 12
"""Tokens between windows, at random up to the one, and later to the other in a model of more
experts than a sample takes, where to learn costs most. Without them text in rows of a window's
length would show every window the same."""
SETTLED: Final = 200
"""Windows until later."""
SAMPLE: Final = 1024
"""Experts a window learns from, at most: a model of R1's size has more than are needed."""
MEMORY: Final = 0.99
"""What a window still counts when the next is learned."""
FLOOR: Final = 0.05
"""Of the mean rate of use: rates below it are told apart no further."""
RARE: Final = 0.2
"""Of the mean rate of use: experts expected to be used less are kept by recency alone, since too
little is seen of them to know better."""
TIE: Final = 0.01
"""What the expected uses still say of those: who of two as recent stays."""
PULL: Final = 1e-4
"""Towards FIRST_WEIGHTS, as a share of the mean square of what is learned from."""
FIRST_WEIGHTS: Final = np.concatenate(
    [1 / (1 + 2.0 ** np.arange(NUM_BENDS)), np.full(len(HALF_LIVES), 1 / len(HALF_LIVES))]
)
"""Before anything was learned."""
RESCALE: Final = 1e20
"""Of a scale, above which all begin anew: far below what float32 holds."""


def _bends() -> Floats:
    """[MAX_AGE + 1, NUM_BENDS]: how much of each bend's weight an age gets. Age 0, a use in the
    running pass, is as age 1."""
    place = np.log2(np.arange(MAX_AGE + 1).clip(min=1))
    bends: Floats = np.maximum(0.0, 1.0 - np.abs(place[:, None] - np.arange(NUM_BENDS)))
    return bends


BENDS: Final = _bends()
RECENCY: Final = 1 / (1.0 + np.arange(MAX_AGE + 1))
"""By age, falling from 1."""
DECAY: Final = (0.5 ** (1 / np.array(HALF_LIVES))).astype(np.float32)
GROWTH: Final = 1 / DECAY
ONE_USE: Final = np.ones(len(HALF_LIVES), np.float32)
"""An array, which is added in half the time of a number."""


def _mean_decay(tokens: int) -> Rows:
    """[len(HALF_LIVES)]: what one of the last `tokens` uses counts on average."""
    means = np.array([decay ** np.arange(tokens) for decay in DECAY.tolist()]).mean(axis=1)
    narrow: Rows = means.astype(np.float32)
    return narrow


def _by_age(weights: Floats) -> Floats:
    """[MAX_AGE + 1]: what recency adds to the score. Nothing for those never used: how many first
    uses there are falls faster than is learned."""
    by_age: Floats = BENDS @ weights[:NUM_BENDS]
    by_age[MAX_AGE] = 0.0
    return by_age


@dataclass(frozen=True)
class _Window:
    """What was known when it began. begin: of the clock. features: [n, NUM_BENDS +
    len(HALF_LIVES)], what the weights are multiplied by. uses: [n], all so far."""

    begin: int
    keys: Keys
    features: Floats
    uses: Rows


class Adaptive(Batched):
    """The score is the expected uses a token over the next WINDOW tokens.

    It is linear in the frequencies of HALF_LIVES and piecewise linear in the logarithm of the time
    since the last use; of experts that are rarely used it is recency alone. The weights are learned
    while running, by weighted least squares over past windows: the error of a rate counts in
    proportion to it, as counts vary, so that little used experts, among which a large cache must
    choose, matter as much as the busiest. Neither recency nor frequency is right for every model:
    LRU and LFU are both among what can be learned.
    """

    name: Final = "adaptive"
    horizon: float = 32.0

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._clock = 0
        # [keys, len(HALF_LIVES)]: decayed sums of uses, each times its scale. What grows is what is
        # added, so that a token costs nothing for the experts it did not choose.
        self._sums = np.zeros((self.num_keys, len(HALF_LIVES)), np.float32)
        # The same memory, a key's four in one number of 16 bytes: numpy moves those twice as fast.
        self._rows = self._sums.view(np.complex128).reshape(-1)
        # Of the last pass's choices, if it was one token.
        self._chosen_sums: Rows | None = None
        # What a choice adds to the sums, for each: one number again.
        self._alike = np.empty(0, np.complex128)
        self._scale = np.ones(len(HALF_LIVES), np.float32)
        # The sums, without scale, of an expert that every token used.
        self._total = np.zeros(len(HALF_LIVES), np.float32)
        self._learned = FIRST_WEIGHTS.copy()
        self._rare = 0.0
        self._by_age = _by_age(self._learned)
        self._by_rate = self._learned[NUM_BENDS:].astype(np.float32)
        self._by_sum = np.zeros(len(HALF_LIVES), np.float32)
        size = len(FIRST_WEIGHTS)
        self._squares, self._products = np.zeros((size, size)), np.zeros(size)
        self._random = np.random.default_rng(0)
        self._window: _Window | None = None
        self._windows = 0
        self._next_step = 1

    def _end_pass(self, keys: Keys, weights: Floats | None, tokens: int) -> None:
        self._clock += tokens
        if tokens == 1:
            self._scale *= GROWTH
            self._total *= DECAY
            self._total += ONE_USE
            added = self._scale
        else:
            # As if the uses were spread evenly over the tokens.
            decay, spread = DECAY**tokens, _mean_decay(tokens)
            self._sums *= decay
            self._total *= decay
            self._total += spread * tokens
            added = (self._scale * spread).astype(np.float32)
            self._window, self._next_step = None, self._clock
        rows = self._rows.take(keys)
        sums = rows.view(np.float32).reshape(-1, len(HALF_LIVES))
        if weights is None:
            # Adding the four to each row would take six times as long.
            if len(self._alike) != len(keys):
                self._alike = np.empty(len(keys), np.complex128)
            self._alike[:] = added.view(np.complex128)
            sums += self._alike.view(np.float32).reshape(sums.shape)
        else:
            sums += (weights[:, None] * added).astype(np.float32)
        self._rows[keys] = rows
        self._chosen_sums = sums if tokens == 1 else None
        if self._clock >= self._next_step:
            self._step()
        self._by_sum = self._by_rate / (self._scale * self._total)

    @property
    def chosen_scores(self) -> Floats:
        if self._chosen_sums is None:
            return super().chosen_scores
        scores: Floats = self._chosen_sums @ self._by_sum + self._by_age[1]
        return scores

    def _score(self, keys: Keys | None) -> Floats:
        if keys is None:
            last, sums = self.last_pass, self._sums
        else:
            last = self.last_pass.take(keys)
            sums = self._sums_of(keys)
        age = np.minimum(self.passes - last, MAX_AGE)
        scores: Floats = self._by_age.take(age) + sums @ self._by_sum
        rare = (scores < self._rare).nonzero()[0]
        scores[rare] = RECENCY.take(age.take(rare)) * (self._rare + TIE * scores.take(rare))
        return scores

    def _sums_of(self, keys: Keys) -> Rows:
        return self._rows.take(keys).view(np.float32).reshape(-1, len(HALF_LIVES))

    def _step(self) -> None:
        """A window ends or begins."""
        wait = 0
        if self._window is not None:
            self._learn(self._window)
            self._window = None
            self._windows += 1
            may_wait = self.num_keys > SAMPLE and self._windows > SETTLED
            longest = LONG_WAIT if may_wait else MAX_WAIT
            wait = int(self._random.integers(longest + 1))
        if wait == 0:
            self._window = self._open_window()
            wait = WINDOW
        self._next_step = self._clock + wait
        if self._scale.max() > RESCALE:
            self._sums /= self._scale
            self._scale[:] = 1.0
            self._chosen_sums = None

    def _open_window(self) -> _Window:
        keys = np.arange(self.num_keys)
        if self.num_keys > SAMPLE:
            keys = self._random.integers(0, self.num_keys, SAMPLE)
        sums = self._sums_of(keys)
        age = np.minimum(self.passes - self.last_pass.take(keys), MAX_AGE)
        features = np.empty((len(keys), len(FIRST_WEIGHTS)))
        features[:, :NUM_BENDS] = BENDS.take(age, axis=0)
        features[:, NUM_BENDS:] = sums / (self._scale * self._total)
        return _Window(self._clock, keys, features, sums[:, -1])

    def _learn(self, window: _Window) -> None:
        uses = self._sums_of(window.keys)[:, -1] - window.uses
        uses /= self._clock - window.begin
        expected = np.maximum(window.features @ self._learned, 0.0)
        mean = float(uses.mean())
        self._rare = RARE * mean
        weighted = window.features / (expected + FLOOR * mean + 1e-9)[:, None]
        self._squares = MEMORY * self._squares + weighted.T @ window.features
        self._products = MEMORY * self._products + weighted.T @ uses
        pull = PULL * np.trace(self._squares) / len(self._squares)
        self._learned = np.linalg.solve(
            self._squares + pull * np.eye(len(self._squares)),
            self._products + pull * FIRST_WEIGHTS,
        )
        self._by_age = _by_age(self._learned)
        self._by_rate = self._learned[NUM_BENDS:].astype(np.float32)
