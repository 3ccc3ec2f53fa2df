"""One choice for each item, the least error within a number of bytes. Never imports torch.

The multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, chapter
11). A price L for a byte makes it easy: every item takes the choice of the least error + L * bytes.
The price is found on the items' convex hulls, where the choices are steps of falling gain a byte
(section 11.2: the linear relaxation), and gives a bound that no choice can go below:

    error  >=  sum over items of min over choices of (error + L * bytes)  -  L * limit

Taking the steps in order, and behind the first that does not fit those that still do, gives a good
choice at once. A dynamic program over the items, whose states are the pairs of bytes and error that
no other pair undercuts in both (section 11.5), then finds the best one: states whose bound is no
better than what is known are dropped. Where more than MAX_STATES would have to be kept, the greedy
choice stands, and how far it may be from the best is known from the bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

MAX_STATES = 4_000_000
"""Of all items together: some 100 MB and seconds."""

ROUNDING = 1e-12
"""Relative: sums of errors in another order."""


@dataclass(frozen=True)
class Choice:
    """error: any measure that adds up, not negative."""

    nbytes: int
    error: float


@dataclass(frozen=True)
class Allocation:
    """chosen: of each item the index of its choice. bound: no choice within the limit has less
    error."""

    chosen: tuple[int, ...]
    nbytes: int
    error: float
    bound: float


def least_bytes(items: Sequence[Sequence[Choice]]) -> int:
    return sum(min(choice.nbytes for choice in item) for item in items)


def allocate(
    items: Sequence[Sequence[Choice]], limit: int, max_states: int = MAX_STATES
) -> Allocation:
    """limit: bytes, at least `least_bytes(items)`. The same input gives the same choice."""
    assert limit >= least_bytes(items), "the caller says so in his own words"
    hulls = [_hull(item) for item in items]
    greedy, price = _greedy(items, hulls, limit)
    bound = _bound(items, price, limit)
    error = _error(items, greedy)
    if error - bound > ROUNDING * error:
        exact = _search(items, limit, price, error, max_states)
        if exact is not None:
            greedy, bound = exact, _error(items, exact)
    nbytes = sum(item[index].nbytes for item, index in zip(items, greedy, strict=True))
    return Allocation(tuple(greedy), nbytes, _error(items, greedy), bound)


def _error(items: Sequence[Sequence[Choice]], chosen: Sequence[int]) -> float:
    return sum(item[index].error for item, index in zip(items, chosen, strict=True))


def _hull(item: Sequence[Choice]) -> list[int]:
    """Indices of the choices on the lower convex hull, by bytes: each step from one to the next
    gains less a byte than the step before."""
    order = sorted(range(len(item)), key=lambda index: (item[index].nbytes, item[index].error))
    hull: list[int] = []
    for index in order:
        if hull and item[index].error >= item[hull[-1]].error:
            continue
        while len(hull) > 1 and _gain(item, hull[-1], index) >= _gain(item, hull[-2], hull[-1]):
            hull.pop()
        hull.append(index)
    return hull


def _gain(item: Sequence[Choice], smaller: int, larger: int) -> float:
    """Error that each byte more spares."""
    spared = item[smaller].error - item[larger].error
    return spared / (item[larger].nbytes - item[smaller].nbytes)


def _greedy(
    items: Sequence[Sequence[Choice]], hulls: Sequence[Sequence[int]], limit: int
) -> tuple[list[int], float]:
    """A choice, and the price at which the linear relaxation runs out of bytes: 0 where it does
    not."""
    chosen = [hull[0] for hull in hulls]
    left = limit - sum(item[index].nbytes for item, index in zip(items, chosen, strict=True))
    steps = sorted(
        (-_gain(items[number], smaller, larger), number, place)
        for number, hull in enumerate(hulls)
        for place, (smaller, larger) in enumerate(pairwise(hull))
    )
    price = 0.0
    for negative_gain, number, place in steps:
        smaller, larger = hulls[number][place : place + 2]
        more = items[number][larger].nbytes - items[number][smaller].nbytes
        if chosen[number] == smaller and more <= left:
            chosen[number] = larger
            left -= more
        elif not price:
            price = -negative_gain
    return chosen, price


def _bound(items: Sequence[Sequence[Choice]], price: float, limit: int) -> float:
    least = sum(min(choice.error + price * choice.nbytes for choice in item) for item in items)
    return max(least - price * limit, 0.0)


def _search(
    items: Sequence[Sequence[Choice]], limit: int, price: float, known: float, max_states: int
) -> list[int] | None:
    """The best choice; None where it would take too many states. known: the error of one."""

    def regret(number: int) -> float:
        """What the second-best choice at this price costs more: where it is much, few states are
        left, so such items come first."""
        costs = sorted(choice.error + price * choice.nbytes for choice in items[number])
        return costs[1] - costs[0] if len(costs) > 1 else np.inf

    order = sorted(range(len(items)), key=regret, reverse=True)
    least_cost = [min(c.error + price * c.nbytes for c in items[number]) for number in order]
    least_size = [min(c.nbytes for c in items[number]) for number in order]
    # Of the items behind each: what they cost at least, and take at least.
    cost_behind = np.append(np.cumsum(least_cost[::-1])[::-1], 0.0)[1:]
    size_behind = np.append(np.cumsum(least_size[::-1])[::-1], 0)[1:]
    worth = known * (1 + ROUNDING)
    nbytes, error = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps: list[tuple[NDArray[np.int32], NDArray[np.int16]]] = []
    total = 0
    for number, cost, size in zip(order, cost_behind, size_behind, strict=True):
        item = items[number]
        sizes = np.array([choice.nbytes for choice in item], dtype=np.int64)
        errors = np.array([choice.error for choice in item])
        next_bytes = (nbytes[:, None] + sizes).ravel()
        next_error = (error[:, None] + errors).ravel()
        states = np.lexsort((next_error, next_bytes))
        fits = next_bytes[states] + size <= limit
        hope = next_error[states] + price * (next_bytes[states] - limit) + cost
        states = states[fits & (hope <= worth)]
        # In the order of bytes a state must have less error than all before it.
        best = np.minimum.accumulate(next_error[states])
        states = states[np.append(True, next_error[states][1:] < best[:-1])[: len(states)]]
        total += len(states)
        if total > max_states:
            return None
        assert len(states), "the known choice is among the states"
        parents, choices = np.divmod(states, len(item))
        steps.append((parents.astype(np.int32), choices.astype(np.int16)))
        nbytes, error = next_bytes[states], next_error[states]
    state = int(np.argmin(error))
    chosen = [0] * len(items)
    for number, (from_states, by_choices) in zip(order[::-1], steps[::-1], strict=True):
        chosen[number] = int(by_choices[state])
        state = int(from_states[state])
    return chosen
