"""How much of a model goes onto a card, or onto each of several. Pure: never imports torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from localr1.errors import MemoryLimitError, UsageError

PARTS: Final = 1 << 30
"""Of a card's room, in which it is found how full cards are to be."""


@dataclass(frozen=True)
class Needs:
    """Bytes of a card's memory. layers: of each layer that cards can compute, from the first on,
    its part of a cache included. head: of the last norm and matrix with what computing them takes;
    None where a card cannot. fixed: of what any number of layers takes beside them, on every card.
    num_layers: of the whole model."""

    layers: Sequence[int]
    head: int | None
    fixed: int
    num_layers: int


@dataclass(frozen=True)
class Share:
    """What of a model a card computes: num_layers layers from number `first` on, and the head."""

    first: int
    num_layers: int
    has_head: bool

    @property
    def last(self) -> int:
        """The number behind the last layer's."""
        return self.first + self.num_layers


def share_of_cards(
    needs: Needs, memory: Sequence[int], asked: int | None, names: Sequence[str]
) -> tuple[Share, ...]:
    """As many layers as there is memory for or as were asked for, each card's behind those of the
    one before; then the head, on the last, if that is all of them. What all cards have more room
    than that for is divided so that they are equally full. memory: bytes there are of each card.
    names: theirs.

    Raises UsageError for a number that is none or that leaves a card without a layer,
    MemoryLimitError where a card has no room for one, or all not for as many as were asked for.
    """
    if asked is not None and asked < 1:
        raise UsageError("--gpu-layers", expected="at least 1", found=asked)
    wanted = len(needs.layers) if asked is None else min(asked, len(needs.layers))
    if wanted < len(memory):
        raise UsageError(
            "--devices" if asked is None or asked > wanted else "--gpu-layers",
            expected="a layer for each card at least",
            found=f"{wanted} {'layer' if wanted == 1 else 'layers'} for {len(memory)} cards",
        )
    room = [each - needs.fixed for each in memory]
    head = needs.head if wanted == needs.num_layers else None
    shares = _evenly(needs.layers, head or 0, room, wanted)
    has_head = head is not None and shares[-1].last == wanted
    if head is not None and not has_head:
        shares = _evenly(needs.layers, 0, room, wanted)
    _check(shares, needs, memory, wanted if asked is not None else 0, names)
    return (*shares[:-1], replace(shares[-1], has_head=has_head))


def homes_of(
    mixtures: Sequence[int], computed_by: Mapping[int, int], memory: Sequence[int]
) -> dict[int, int]:
    """The card that each mixture's routed experts may lie on: the one that computes the layer; of
    other layers wherever a layer's experts find the most memory. computed_by: numbers of cards, by
    that of the layer. memory: bytes that each card has for experts."""
    homes = {layer: computed_by[layer] for layer in mixtures if layer in computed_by}
    counts = [list(homes.values()).count(card) for card in range(len(memory))]
    for layer in mixtures:
        if layer not in homes:
            shares = [each / (count + 1) for each, count in zip(memory, counts, strict=True)]
            homes[layer] = shares.index(max(shares))
            counts[homes[layer]] += 1
    return homes


def _evenly(
    layers: Sequence[int], head: int, room: Sequence[int], wanted: int
) -> tuple[Share, ...]:
    """The fewest parts of every card's room that hold all of them; the whole rooms where none do.
    (The fuller all cards may be, the further does each come.)"""
    low, high = 1, PARTS
    while low < high:
        middle = (low + high) // 2
        is_enough = _filled(layers, head, room, wanted, middle)[-1].last == wanted
        low, high = (low, middle) if is_enough else (middle + 1, high)
    return _filled(layers, head, room, wanted, low)


def _filled(
    layers: Sequence[int], head: int, room: Sequence[int], wanted: int, parts: int
) -> tuple[Share, ...]:
    """One card after another up to so many parts of its room; but each with one layer at least, if
    there is room at all, and none with those that the cards behind it need for that. head: what the
    last one keeps for it."""
    shares: list[Share] = []
    at = 0
    for number, whole in enumerate(room):
        others = len(room) - number - 1
        first, most, left = at, wanted - others, whole * parts // PARTS
        if not others:
            whole, left = whole - head, left - head
        while at < most and (left >= layers[at] or (at == first and whole >= layers[at])):
            left -= layers[at]
            at += 1
        shares.append(Share(first, at - first, False))
    return tuple(shares)


def _check(
    shares: Sequence[Share],
    needs: Needs,
    memory: Sequence[int],
    least: int,
    names: Sequence[str],
) -> None:
    """least: layers that all must hold together."""
    for share, nbytes, name in zip(shares, memory, names, strict=True):
        if not share.num_layers:
            wanted = 1 if len(shares) > 1 else max(least, 1)
            taken = needs.fixed + sum(needs.layers[share.first : share.first + wanted])
            raise _no_room(name, wanted, taken, nbytes, 0)
    if shares[-1].last < least:
        taken = len(shares) * needs.fixed + sum(needs.layers[:least])
        raise _no_room(" and ".join(names), least, taken, sum(memory), shares[-1].last)


def _no_room(name: str, wanted: int, taken: int, memory: int, fitting: int) -> MemoryLimitError:
    return MemoryLimitError(
        f"{name}: memory for {wanted} {'layer' if wanted == 1 else 'layers'} of the model",
        expected=f"{_mib(taken)} MiB",
        found=f"{_mib(memory)} MiB, which hold {fitting}",
        fix="Close other programs, choose a smaller context, or give a smaller --gpu-layers."
        if fitting
        else "Close other programs or choose a smaller context; else leave the card out.",
    )


def _mib(nbytes: int) -> int:
    return -(-nbytes // (1 << 20)) if nbytes > 0 else 0
