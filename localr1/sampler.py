"""Logits to the next token.

The order, as transformers has it: repetition penalty, temperature, top-k, top-p (of what top-k
left, renormalized), min-p, then one draw. The filters all keep a head of the tokens sorted by
probability, so no full sort is made: a threshold below the largest logit gives a few candidates
that are provably enough, and only those are sorted. Ties are broken by the lower id.

One seed gives one sequence of draws (numpy's Philox), whatever the number of threads.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from localr1.errors import NumericsError, UsageError

MAX_SEED = 2**63 - 1
_FIRST_DEPTH = 4.0
"""How far below the largest logit, in units of the temperature, the first candidates reach. A token
deeper has less than exp(-4) = 2% of the largest one's probability."""
_BLOCK = 512
"""Tokens of a block where the whole vocabulary is drawn from."""


@dataclass(frozen=True)
class SamplingParams:
    """temperature: 0 takes the most probable token. top_k: 0 keeps all. top_p: the least set of
    tokens with at least that probability; 1 keeps all. min_p: at least that share of the largest
    probability; 0 keeps all. repetition_penalty: 1 is none; logits of tokens seen are divided by it
    when positive, else multiplied (CTRL, Keskar et al. 2019, section 4.1). seed: None draws one.

    Raises UsageError for a value outside its range.
    """

    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, 100.0)
        _check("top_p", self.top_p, 0.0, 1.0, low_included=False)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_included=False)
        _check("top_k", self.top_k, 0, 2**31 - 1)
        if self.seed is not None:
            _check("seed", self.seed, 0, MAX_SEED)


def _check(name: str, value: float, low: float, high: float, *, low_included: bool = True) -> None:
    whole = isinstance(low, int)
    fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not fits or not low <= value <= high or (value == low and not low_included):
        start = "from" if low_included else "above"
        raise UsageError(
            name,
            expected=f"{'a whole number' if whole else 'a number'} {start} {low} to {high}",
            found=repr(value)[:40],
        )


class Sampler:
    """Draws the tokens of one generation. seed: the one in use, drawn when none was given."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.seed = secrets.randbelow(2**32) if params.seed is None else params.seed
        self._random = np.random.Generator(np.random.Philox(self.seed))
        self._seen: NDArray[np.bool_] | None = None
        self._num_seen = 0

    @property
    def is_greedy(self) -> bool:
        """Whether it takes the largest logit, the lowest id of equals, and asks nothing else."""
        params = self.params
        return self._takes_the_largest and params.repetition_penalty == 1.0

    @property
    def _takes_the_largest(self) -> bool:
        return self.params.temperature == 0.0 or self.params.top_k == 1

    def sample(
        self,
        logits: Tensor,
        history: Sequence[int] = (),
        allowed: NDArray[np.bool_] | None = None,
    ) -> int:
        """The next token's id. logits: float32 [vocab] or [1, vocab], left as they are.

        history: the ids so far, for the repetition penalty; from call to call it only grows.
        allowed: [vocab], the tokens there is a choice of, at least one; None for all of them.
        Raises NumericsError when a logit is NaN or infinite.
        """
        values: NDArray[np.float32] = logits.detach().reshape(-1).numpy()
        # Both see a NaN; the least sees -inf, the largest +inf.
        if not (math.isfinite(values.min()) and math.isfinite(values.max())):
            raise NumericsError(
                "logits",
                expected="finite numbers",
                found=f"{np.count_nonzero(~np.isfinite(values)):,} of {values.size:,} are not",
                fix="The model's weights are damaged, or its numbers overflow: verify its files.",
            )
        if self.params.repetition_penalty != 1.0:
            values = self._penalized(values, history)
        if allowed is not None:
            ids = np.flatnonzero(allowed)
            return int(ids[self._choose(values[ids])])
        return self._choose(values)

    def _choose(self, values: NDArray[np.float32]) -> int:
        """The place of one of the logits `values`."""
        if self._takes_the_largest:
            return int(values.argmax())
        top = values.max()
        exponentials = None
        if self._keeps_all(values.size) and (self.params.top_p < 1.0 or self.params.min_p == 0.0):
            exponentials = self._exponentials(values, top)
            if self.params.top_p == 1.0:
                return self._draw_unsorted(exponentials)
        total = None if exponentials is None else float(exponentials.sum())
        ids = self._candidates(values, exponentials, total, top)
        scaled = (values[ids].astype(np.float64) - float(top)) / self.params.temperature
        weights = np.exp(scaled, out=scaled)
        return int(ids[self._draw(weights[: self._num_kept(weights, total)])])

    def _keeps_all(self, vocab_size: int) -> bool:
        return self.params.top_k == 0 or self.params.top_k >= vocab_size

    def _draw(self, weights: NDArray[np.float64]) -> int:
        """An index, by the inverse of the distribution function."""
        bounds = np.cumsum(weights)
        drawn = self._random.random() * bounds[-1]
        # side="right": a draw on a bound belongs to the next one, so weight 0 is never drawn.
        return min(int(np.searchsorted(bounds, drawn, side="right")), len(weights) - 1)

    def _draw_unsorted(self, weights: NDArray[np.float32]) -> int:
        """A block, then a token in it with the same draw's remainder: sums of blocks are many times
        as fast as a running sum over a whole vocabulary."""
        starts = np.arange(0, weights.size, _BLOCK)
        sums = np.add.reduceat(weights, starts, dtype=np.float64)
        block = self._draw(sums)
        inner = weights[starts[block] : starts[block] + _BLOCK].astype(np.float64)
        return int(starts[block]) + self._draw(inner)

    def _penalized(
        self, values: NDArray[np.float32], history: Sequence[int]
    ) -> NDArray[np.float32]:
        if self._seen is None:
            self._seen = np.zeros(values.size, dtype=np.bool_)
        self._seen[list(history[self._num_seen :])] = True
        self._num_seen = len(history)
        seen = np.flatnonzero(self._seen)
        penalty = np.float32(self.params.repetition_penalty)
        result = values.copy()
        chosen = values[seen]
        result[seen] = np.where(chosen > 0, chosen / penalty, chosen * penalty)
        return result

    def _exponentials(self, values: NDArray[np.float32], top: np.float32) -> NDArray[np.float32]:
        """exp((logit - largest) / temperature) of all tokens. float32 and numpy's sums in pairs are
        good to 1e-6 of the sum, which places the edge of top-p well enough."""
        scaled: NDArray[np.float32] = values - top
        scaled *= np.float32(1.0 / self.params.temperature)
        np.exp(scaled, out=scaled)
        return scaled

    def _candidates(
        self,
        values: NDArray[np.float32],
        exponentials: NDArray[np.float32] | None,
        total: float | None,
        top: np.float32,
    ) -> NDArray[np.int64]:
        """The ids of the most probable tokens in descending order, as many as the filters may keep
        or more. exponentials, total: given where top-p is measured against all tokens."""
        params = self.params
        depth = _FIRST_DEPTH
        while True:
            floor = np.float32(float(top) - depth * params.temperature)
            found = np.flatnonzero(values >= floor)
            if found.size == values.size:
                break
            if params.min_p > 0.0 and depth > -math.log(params.min_p) + 1e-3:
                break  # Every token further down is below min_p.
            if not self._keeps_all(values.size):
                if found.size >= params.top_k:
                    break
            elif (
                exponentials is not None
                and total is not None
                and float(exponentials[found].sum()) >= params.top_p * total
            ):
                break
            depth *= 1.5
        # One integer that sorts like (descending logit, ascending id): the bits of a float sort as
        # integers do once those of negative ones are flipped. Adding 0.0 makes -0.0 equal 0.0.
        bits = (values[found] + np.float32(0.0)).view(np.int32)
        ascending = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
        keys = ((~ascending).astype(np.int64) << 32) | found
        if not self._keeps_all(values.size) and params.top_k < keys.size:
            keys = np.partition(keys, params.top_k - 1)[: params.top_k]
        return np.sort(keys) & 0xFFFFFFFF

    def _num_kept(self, weights: NDArray[np.float64], total: float | None) -> int:
        """How many of the candidates, weights in descending order, the filters keep.

        total: the weight that top-p is a share of; None: that of the candidates.
        """
        params = self.params
        count = weights.size
        if params.top_p < 1.0:
            sums = np.cumsum(weights)
            whole = float(sums[-1]) if total is None else total
            # The first token whose sum reaches the share is the last one kept.
            count = min(count, int(np.searchsorted(sums, params.top_p * whole)) + 1)
        if params.min_p > 0.0:
            count = max(1, int(np.count_nonzero(weights[:count] >= params.min_p)))
        return count
