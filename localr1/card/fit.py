"""How much of a model goes onto a card. Pure: never imports torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from localr1.errors import MemoryLimitError, UsageError


@dataclass(frozen=True)
class Needs:
    """Bytes of the card's memory. layers: of each layer that the card can compute, from the first
    on, its part of a cache included. head: of the last norm and matrix with what computing them
    takes; None where the card cannot. fixed: of what any number of layers takes beside them.
    num_layers: of the whole model."""

    layers: Sequence[int]
    head: int | None
    fixed: int
    num_layers: int


@dataclass(frozen=True)
class Share:
    """What of a model the card computes."""

    num_layers: int
    has_head: bool


def share_of_card(needs: Needs, memory: int, asked: int | None, name: str) -> Share:
    """As many layers as there is memory for or as were asked for, then the head, if that is all of
    them. memory: bytes of the card there are. name: the card's. Raises UsageError for a number that
    is none, MemoryLimitError where not even one layer fits, or not as many as were asked for."""
    if asked is not None and asked < 1:
        raise UsageError("--gpu-layers", expected="at least 1", found=asked)
    wanted = len(needs.layers) if asked is None else min(asked, len(needs.layers))
    fitting, left = 0, memory - needs.fixed
    while fitting < wanted and left >= needs.layers[fitting]:
        left -= needs.layers[fitting]
        fitting += 1
    if fitting < (wanted if asked is not None else 1):
        least = wanted if asked is not None else 1
        raise MemoryLimitError(
            f"{name}: memory for {least} {'layer' if least == 1 else 'layers'} of the model",
            expected=f"{_mib(needs.fixed + sum(needs.layers[:least]))} MiB",
            found=f"{_mib(memory)} MiB, which hold {fitting}",
            fix="Close other programs, choose a smaller context, or give a smaller --gpu-layers."
            if fitting
            else "Close other programs or choose a smaller context; else leave --device out.",
        )
    has_all = fitting == needs.num_layers
    return Share(fitting, has_all and needs.head is not None and left >= needs.head)


def _mib(nbytes: int) -> int:
    return -(-nbytes // (1 << 20)) if nbytes > 0 else 0
