"""Logits to the next token.

The order, as transformers has it: repetition penalty, temperature, top-k, top-p (of what top-k
left, renormalized), min-p, then one draw. The filters all keep a head of the tokens sorted by
probability, and the draw goes down that order too, so no full sort is made: a floor below the
largest logit gives a few candidates, and only where they do not settle which token is drawn, more.
Ties are broken by the lower id.

One seed gives one sequence of draws (numpy's Philox), whatever the number of threads, and the same
tokens whether a draw is settled by a device's candidates or by all logits.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from localr1.candidates import Candidates, Sought
from localr1.errors import NumericsError, UsageError

MAX_SEED = 2**63 - 1
TOTAL_ERROR: Final = 4e-5
"""Relative, of a sum of float32 weights over a vocabulary, in whatever order, against any other. A
weight's exponent, at most 87 in size where it counts, is rounded three times (difference, inverse
temperature, product): 87 * 3 * 2^-24 = 1.6e-5 of the weight, and a hundredth of that for each of
the exponential and the sum; twice, as either may be off."""
_FIRST_DEPTH = 4.0
"""How far below the largest logit, in units of the temperature, the first candidates reach. A token
deeper has less than exp(-4) = 2% of the largest one's probability."""
_DEVICE_DEPTH = 10.0
"""As far as a device looks: tokens deeper have less than exp(-10) = 0.005% of the largest one's
probability each."""
_LEAST_TEMPERATURE = 1e-20
"""What is colder draws the same, and its inverse would leave float32's range."""


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
    def sought(self) -> Sought | None:
        """The candidates that most draws are settled by; None where all logits are needed."""
        params = self.params
        if params.repetition_penalty != 1.0:
            return None
        if self._takes_the_largest:
            return Sought(0.0, 1.0)
        depth = _DEVICE_DEPTH
        if params.min_p > 0.0:
            depth = min(depth, 1e-2 - math.log(params.min_p))
        return Sought(depth * self._temperature, 1.0 / self._temperature)

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

    def sample_from(self, found: Candidates) -> int:
        """The token that `sample` would draw from all logits; found: of `sought`."""
        if self._takes_the_largest:
            return int(found.ids[found.logits.argmax()])
        drawn = self._random.random()
        head = self._head(found.ids, found.logits, found.floor, found.num_rest)
        whole = float(head.sums[-1]) + found.rest
        total = _Range(whole * (1.0 - TOTAL_ERROR), whole * (1.0 + TOTAL_ERROR))
        place = self._settled(head, total, drawn)
        if place is not None:
            return int(head.ids[place])
        return self._draw(found.all_logits().reshape(-1).numpy(), drawn)

    def _choose(self, values: NDArray[np.float32]) -> int:
        """The place of one of the logits `values`."""
        if self._takes_the_largest:
            return int(values.argmax())
        return self._draw(values, self._random.random())

    def _draw(self, values: NDArray[np.float32], drawn: float) -> int:
        """By a number from 0 to 1, of the distribution function; from candidates that reach deeper
        until they settle it, as all tokens do."""
        top = values.max()
        total = self._total(values, top)
        depth = _FIRST_DEPTH
        while True:
            floor = np.float32(float(top) - depth * self._temperature)
            if floor == top:  # Colder than float32 can tell.
                floor = np.nextafter(top, np.float32(-np.inf))
            ids = np.flatnonzero(values >= floor)
            head = self._head(ids, values[ids], floor, values.size - ids.size)
            place = self._settled(head, total, drawn)
            if place is not None:
                return int(head.ids[place])
            depth *= 1.5

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

    def _total(self, values: NDArray[np.float32], top: np.float32) -> "_Range":
        """Of all tokens' weights, where that is asked for: float32, and numpy's sums in pairs."""
        params = self.params
        if self._cuts(values.size) or (params.top_p == 1.0 and params.min_p > 0.0):
            return _UNKNOWN
        scaled: NDArray[np.float32] = values - top
        scaled *= np.float32(1.0 / self._temperature)
        total = float(np.exp(scaled, out=scaled).sum())
        return _Range(total, total)

    def _cuts(self, vocab_size: int) -> bool:
        """Whether top-k leaves tokens out."""
        return 0 < self.params.top_k < vocab_size

    @property
    def _temperature(self) -> float:
        return max(self.params.temperature, _LEAST_TEMPERATURE)

    def _head(
        self,
        ids: NDArray[np.int64],
        logits: NDArray[np.float32],
        floor: np.float32,
        num_rest: int,
    ) -> "_Head":
        """What top-k leaves of the tokens whose logits are at least `floor`; num_rest: the others
        of the vocabulary."""
        is_cut = self._cuts(ids.size + num_rest)
        order = _descending(logits, self.params.top_k if is_cut else ids.size)
        largest = float(logits[order[0]])
        weights = logits[order].astype(np.float64)
        weights -= largest
        weights /= self._temperature
        sums = np.cumsum(np.exp(weights, out=weights))
        # A little more than it may be rounded to.
        most = 1.000001 * math.exp((float(floor) - largest) / self._temperature)
        total = None
        if is_cut:
            num_rest = self.params.top_k - order.size
            total = _Range(float(sums[-1]), float(sums[-1]) + num_rest * most)
        return _Head(ids[order], weights, sums, num_rest, most, total)

    def _settled(self, head: "_Head", total: "_Range", drawn: float) -> int | None:
        """The place in `head` of the token that `drawn` falls on; None where that takes more tokens
        or a better total. total: of the weights of the vocabulary."""
        params, sums, num_kept = self.params, head.sums, None
        count, is_whole = sums.size, head.num_rest == 0
        low, high = head.total or total
        if params.top_p < 1.0:
            # The first token whose sum reaches the share is the last one kept.
            first, last = sums.searchsorted((params.top_p * low, params.top_p * high)).tolist()
            if first != last or (first == count and not is_whole):
                return None
            num_kept = min(first + 1, count)
        if params.min_p > 0.0:
            strong = int(np.count_nonzero(head.weights[:num_kept] >= params.min_p))
            if num_kept is not None or strong < count or is_whole or head.most < params.min_p:
                num_kept = strong
            else:
                low, high = float(sums[-1]), high * (1.0 + TOTAL_ERROR)
        if num_kept is not None:
            low = high = float(sums[num_kept - 1])
            sums = sums[:num_kept]
        # side="right": a draw on a bound belongs to the next one, so weight 0 is never drawn.
        first, last = sums.searchsorted((drawn * low, drawn * high), side="right").tolist()
        if first != last or (first == count and not is_whole):
            return None
        return min(int(first), sums.size - 1)


class _Range(NamedTuple):
    """That a sum of weights is in."""

    low: float
    high: float


_UNKNOWN: Final = _Range(0.0, math.inf)


class _Head(NamedTuple):
    """The most probable tokens: float64 weights exp((logit - largest) / temperature), descending,
    and their running sums. num_rest: of others that top-k leaves; most: none of them weighs more.
    total: of the weights of all that top-k leaves, where it leaves some out."""

    ids: NDArray[np.int64]
    weights: NDArray[np.float64]
    sums: NDArray[np.float64]
    num_rest: int
    most: float
    total: _Range | None


def _descending(logits: NDArray[np.float32], most: int) -> NDArray[np.int64]:
    """The places of the largest, at most so many, the lower one of equals first."""
    # One integer that sorts like (descending logit, ascending place): the bits of a float sort as
    # integers do once those of negative ones are flipped. Adding 0.0 makes -0.0 equal 0.0.
    bits = (logits + np.float32(0.0)).view(np.int32)
    ascending = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    keys = ((~ascending).astype(np.int64) << 32) | np.arange(logits.size)
    if most < keys.size:
        keys = np.partition(keys, most - 1)[:most]
    keys.sort()
    return keys & 0xFFFFFFFF
