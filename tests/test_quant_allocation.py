"""The choice of bits against every choice there is, and its bound where there are too many."""

import itertools

import numpy as np
import pytest

from localr1.quant.allocation import Choice, allocate, least_bytes

CLOSE = 1e-9
"""Relative; sums of a few numbers. The second-best choice is some 1e-3 away."""


def random_items(seed: int, count: int, most_choices: int = 3) -> list[list[Choice]]:
    """Some choices are worse than others in both, some have equal sizes."""
    generator = np.random.default_rng(seed)
    return [
        [
            Choice(int(generator.integers(1, 30)), float(generator.exponential()))
            for _ in range(generator.integers(1, most_choices + 1))
        ]
        for _ in range(count)
    ]


def least_error(items: list[list[Choice]], limit: int) -> float:
    """By trying everything."""
    return min(
        sum(choice.error for choice in chosen)
        for chosen in itertools.product(*items)
        if sum(choice.nbytes for choice in chosen) <= limit
    )


@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_best_of_all_choices(seed: int) -> None:
    items = random_items(seed, 7)
    smallest = least_bytes(items)
    largest = sum(max(choice.nbytes for choice in item) for item in items)
    for limit in np.linspace(smallest, largest + 5, 6).astype(int).tolist():
        found = allocate(items, limit)
        assert found.nbytes <= limit
        chosen = [item[index] for item, index in zip(items, found.chosen, strict=True)]
        assert found.nbytes == sum(choice.nbytes for choice in chosen)
        assert found.error == pytest.approx(sum(choice.error for choice in chosen), rel=CLOSE)
        assert found.error == pytest.approx(least_error(items, limit), rel=CLOSE)
        assert found.bound == pytest.approx(found.error, rel=CLOSE)
        assert allocate(items, limit) == found


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_holds_where_the_search_is_given_up(seed: int) -> None:
    items = random_items(seed, 7)
    limit = least_bytes(items) + 20
    found = allocate(items, limit, max_states=0)
    assert found.nbytes <= limit
    best = least_error(items, limit)
    assert found.bound <= best * (1 + CLOSE)
    assert best <= found.error * (1 + CLOSE)


def test_the_greedy_choice_is_not_always_the_best() -> None:
    """Else the search would be for nothing."""
    items = [[Choice(1, 10.0), Choice(6, 1.0)], [Choice(1, 10.0), Choice(5, 3.0)]]
    items.append([Choice(1, 10.0), Choice(5, 3.1)])
    given_up, found = allocate(items, 11, max_states=0), allocate(items, 11)
    assert found.error == pytest.approx(16.1)
    assert given_up.error > found.error
    assert given_up.bound < found.error == found.bound


def test_many_alike_items_in_little_time() -> None:
    """Of a mixture: 30 layers of 64 experts. What is left of the bound is far below the error."""
    generator = np.random.default_rng(0)
    items = [
        [Choice(4, float(weight)), Choice(8, float(weight) / 256)]
        for weight in generator.exponential(size=30 * 64)
    ]
    found = allocate(items, 5 * len(items))
    assert found.nbytes == 5 * len(items)
    assert found.error - found.bound < 1e-3 * found.error


def test_nothing_to_choose() -> None:
    assert allocate([], 0).chosen == ()
    assert allocate([[Choice(5, 0.5)]], 5).error == 0.5
