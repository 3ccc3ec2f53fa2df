"""How much of a model goes onto a card, or several, from bytes alone."""

import pytest

from localr1.card.fit import Needs, Share, homes_of, share_of_cards
from localr1.errors import MemoryLimitError, UsageError

MIB = 1 << 20
NEEDS = Needs([10 * MIB, 20 * MIB, 10 * MIB], head=5 * MIB, fixed=3 * MIB, num_layers=3)


def share_of_one(needs: Needs, memory: int, asked: int | None) -> Share:
    (share,) = share_of_cards(needs, [memory], asked, ["card"])
    return share


@pytest.mark.parametrize(
    ("memory", "share"),
    [
        (13, Share(0, 1, False)),
        (32, Share(0, 1, False)),
        (33, Share(0, 2, False)),
        (43, Share(0, 3, False)),
        (47, Share(0, 3, False)),
        (48, Share(0, 3, True)),
        (1000, Share(0, 3, True)),
    ],
)
def test_layers_come_first_and_then_the_head(memory: int, share: Share) -> None:
    assert share_of_one(NEEDS, memory * MIB, None) == share


def test_what_was_asked_for() -> None:
    assert share_of_one(NEEDS, 1000 * MIB, 2) == Share(0, 2, False)
    assert share_of_one(NEEDS, 1000 * MIB, 3) == Share(0, 3, True)
    assert share_of_one(NEEDS, 1000 * MIB, 80) == Share(0, 3, True)
    assert share_of_one(NEEDS, 43 * MIB, 80) == Share(0, 3, False)


def test_a_head_that_cannot_be_computed_and_layers_that_cannot() -> None:
    no_head = Needs(NEEDS.layers, None, NEEDS.fixed, 3)
    assert share_of_one(no_head, 1000 * MIB, None) == Share(0, 3, False)
    longer = Needs(NEEDS.layers, NEEDS.head, NEEDS.fixed, num_layers=4)
    assert share_of_one(longer, 1000 * MIB, None) == Share(0, 3, False)


def test_too_little_memory_says_how_much_would_do() -> None:
    with pytest.raises(
        MemoryLimitError,
        match=r"card: memory for 1 layer of the model: expected 13 MiB, found 12 MiB.*leave",
    ):
        share_of_one(NEEDS, 12 * MIB, None)
    with pytest.raises(
        MemoryLimitError,
        match=r"for 3 layers.*expected 43 MiB, found 40 MiB, which hold 2.*smaller",
    ):
        share_of_one(NEEDS, 40 * MIB, 3)
    with pytest.raises(MemoryLimitError, match="found 0 MiB"):
        share_of_one(NEEDS, -5, None)
    with pytest.raises(UsageError, match="--gpu-layers: expected at least 1, found -1"):
        share_of_one(NEEDS, MIB, -1)


def shares(memory: list[int], asked: int | None = None, needs: Needs = NEEDS) -> list[int]:
    """Layers of each card, and one more on the last that has the head."""
    names = [f"card {number}" for number in range(len(memory))]
    found = share_of_cards(needs, [each * MIB for each in memory], asked, names)
    assert [each.first for each in found] == [0, *(each.last for each in found[:-1])]
    assert not any(each.has_head for each in found[:-1])
    return [each.num_layers + each.has_head for each in found]


TWELVE = Needs([10 * MIB] * 12, head=20 * MIB, fixed=5 * MIB, num_layers=12)


@pytest.mark.parametrize(
    ("memory", "layers"),
    [
        ([75, 75], [7, 6]),  # All that there is: 70 MiB, and 70 with the head.
        ([75, 74], [6, 6]),  # The head has no room.
        ([75, 64], [7, 5]),
        ([75, 45], [7, 4]),
        ([500, 500], [7, 6]),
        ([1000, 500], [10, 3]),
        ([500, 1000], [4, 9]),
        ([100_000, 500], [11, 2]),  # Each has one, and the head is the last one's.
        ([500, 100_000], [1, 12]),
        ([500, 500, 500], [5, 5, 3]),
        ([300, 200, 100], [7, 4, 2]),
        ([15, 15, 15], [1, 1, 1]),
    ],
)
def test_cards_are_equally_full(memory: list[int], layers: list[int]) -> None:
    assert shares(memory, needs=TWELVE) == layers


def test_layers_that_were_asked_for_are_divided_too() -> None:
    assert shares([500, 500], 6, TWELVE) == [3, 3]
    assert shares([500, 500], 2, TWELVE) == [1, 1]
    assert shares([500, 500], 99, TWELVE) == [7, 6]
    assert shares([15, 500], 6, TWELVE) == [1, 5]


def test_a_card_without_a_layer_is_refused() -> None:
    with pytest.raises(MemoryLimitError, match=r"card 1: memory for 1 layer .* 15 MiB, found 14"):
        shares([500, 14, 500], needs=TWELVE)
    with pytest.raises(MemoryLimitError, match=r"card 0: memory for 1 layer .* 15 MiB, found 3"):
        shares([3, 500], 6, TWELVE)
    told = r"card 0 and card 1: memory for 8 layers .* 90 MiB, found 50 MiB, which hold 4"
    with pytest.raises(MemoryLimitError, match=told):
        shares([25, 25], 8, TWELVE)
    with pytest.raises(
        UsageError, match=r"--devices: .*layer for each card.* 3 layers for 4 cards"
    ):
        shares([500] * 4)
    with pytest.raises(UsageError, match=r"--gpu-layers: .* found 1 layer for 2 cards"):
        shares([500] * 2, 1)


def test_experts_lie_where_their_layer_is_computed_and_else_where_there_is_most_room() -> None:
    assert homes_of([1, 2, 3, 4], {1: 0, 2: 0, 3: 1, 4: 1}, [9, 1]) == {1: 0, 2: 0, 3: 1, 4: 1}
    assert homes_of([1, 2, 3, 4], {1: 0, 2: 1}, [30, 10]) == {1: 0, 2: 1, 3: 0, 4: 0}
    assert homes_of([0, 1, 2], {}, [10, 20]) == {0: 1, 1: 0, 2: 1}
    assert homes_of([], {}, [10, 20]) == {}
    assert homes_of([3, 4], {}, [10]) == {3: 0, 4: 0}
