"""How much of a model goes onto a card, from bytes alone."""

import pytest

from localr1.card.fit import Needs, Share, share_of_card
from localr1.errors import MemoryLimitError, UsageError

MIB = 1 << 20
NEEDS = Needs([10 * MIB, 20 * MIB, 10 * MIB], head=5 * MIB, fixed=3 * MIB, num_layers=3)


@pytest.mark.parametrize(
    ("memory", "share"),
    [
        (13, Share(1, False)),
        (32, Share(1, False)),
        (33, Share(2, False)),
        (43, Share(3, False)),
        (47, Share(3, False)),
        (48, Share(3, True)),
        (1000, Share(3, True)),
    ],
)
def test_layers_come_first_and_then_the_head(memory: int, share: Share) -> None:
    assert share_of_card(NEEDS, memory * MIB, None, "card") == share


def test_what_was_asked_for() -> None:
    assert share_of_card(NEEDS, 1000 * MIB, 2, "card") == Share(2, False)
    assert share_of_card(NEEDS, 1000 * MIB, 3, "card") == Share(3, True)
    assert share_of_card(NEEDS, 1000 * MIB, 80, "card") == Share(3, True)
    assert share_of_card(NEEDS, 43 * MIB, 80, "card") == Share(3, False)


def test_a_head_that_cannot_be_computed_and_layers_that_cannot() -> None:
    no_head = Needs(NEEDS.layers, None, NEEDS.fixed, 3)
    assert share_of_card(no_head, 1000 * MIB, None, "card") == Share(3, False)
    longer = Needs(NEEDS.layers, NEEDS.head, NEEDS.fixed, num_layers=4)
    assert share_of_card(longer, 1000 * MIB, None, "card") == Share(3, False)


def test_too_little_memory_says_how_much_would_do() -> None:
    with pytest.raises(
        MemoryLimitError,
        match=r"card: memory for 1 layer of the model: expected 13 MiB, found 12 MiB.*leave",
    ):
        share_of_card(NEEDS, 12 * MIB, None, "card")
    with pytest.raises(
        MemoryLimitError,
        match=r"for 3 layers.*expected 43 MiB, found 40 MiB, which hold 2.*smaller",
    ):
        share_of_card(NEEDS, 40 * MIB, 3, "card")
    with pytest.raises(MemoryLimitError, match="found 0 MiB"):
        share_of_card(NEEDS, -5, None, "card")
    with pytest.raises(UsageError, match="--gpu-layers: expected at least 1, found -1"):
        share_of_card(NEEDS, MIB, -1, "card")
