"""The layers of a model on one card or several, one behind another."""

import contextlib
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from localr1.candidates import Candidates, Sought
from localr1.card.layers import CardLayers, Segment, SequenceMemory
from localr1.card.workspace import TOKENS_OF_HEAD, Sizes
from localr1.errors import LocalR1Error


class CardChain:
    """cards: each with the layers behind those of the one before it, the first from the model's
    first on, all of the same sizes; a head is on the last. Owns them. Used by one thread at a time.

    What a card makes of a token is the next one's input by way of pinned memory: the one copies it
    there, the other from there behind an event, and the host waits only when all of them have their
    work.
    """

    def __init__(self, cards: Sequence[CardLayers]) -> None:
        assert all(one.last == other.first for one, other in pairwise(cards))
        self.cards = list(cards)

    @property
    def name(self) -> str:
        return " and ".join(card.driver.name for card in self.cards)

    @property
    def sizes(self) -> Sizes:
        return self.cards[-1].sizes

    @property
    def num_layers(self) -> int:
        return self.cards[-1].last

    @property
    def mixtures(self) -> list[int]:
        """The numbers of the layers that are."""
        return [index for card in self.cards for index in card.mixtures]

    @property
    def card_of_mixture(self) -> dict[int, int]:
        """The number of the card that computes it, by that of the layer."""
        return {index: card for card, own in enumerate(self.cards) for index in own.mixtures}

    @property
    def has_head(self) -> bool:
        return self.cards[-1].has_head

    @property
    def nbytes(self) -> int:
        """Of the cards' memory."""
        return sum(card.nbytes for card in self.cards)

    @property
    def segments(self) -> list[Segment]:
        """All layers, cut where a mixture is the host's to compute."""
        found, first = [], 0
        for index in self.mixtures:
            found.append(Segment(first, index + 1, without_mixture=True))
            first = index + 1
        return [*found, Segment(first, self.num_layers)]

    @property
    def whole(self) -> Segment:
        return Segment(0, self.num_layers)

    def sequence(self) -> tuple[SequenceMemory, ...]:
        """Each card's memory for a sequence of up to `sizes.capacity` positions; to be given back
        with `give_back`. Raises MemoryLimitError where other sequences have taken it all."""
        found: list[SequenceMemory] = []
        try:
            for card in self.cards:
                card.driver.enter()
                found.append(card.sequence())
        except LocalR1Error:
            self.give_back(found)
            raise
        return tuple(found)

    def give_back(self, memory: Sequence[SequenceMemory]) -> None:
        for card, part in zip(self.cards, memory, strict=False):
            card.give_back(part)

    def run(
        self,
        x: Tensor,
        start: int,
        memory: Sequence[SequenceMemory],
        wanted: int,
        segment: Segment,
    ) -> Tensor:
        """x float32 [T, hidden], what the layer before the segment made of tokens from position
        `start` on, T at most `sizes.most_tokens`. They join the cache. Returns what the last
        `wanted` tokens have become, as `CardLayers.output`. Mixtures within a segment take one
        token. More than TOKENS_OF_HEAD logits are those of all tokens."""
        last = self.cards[-1]
        if wanted > TOKENS_OF_HEAD and last.ends_in_head(segment):
            assert wanted == len(x)
            self._run(x, start, memory, 0, segment, None)
            return torch.cat(list(self._logits(len(x))))
        last, own = self._run(x, start, memory, wanted, segment, None)
        return last.output(wanted, own) if wanted else torch.empty(0)

    def select(
        self,
        x: Tensor,
        start: int,
        memory: Sequence[SequenceMemory],
        segment: Segment,
        sought: Sought,
    ) -> Candidates | Tensor:
        """As `run` behind a head, but of the last token's logits only those that are sought, if all
        are finite and there are not too many; else all of them, [1, vocabulary]."""
        last, _ = self._run(x, start, memory, 1, segment, sought)
        found = last.candidates(sought)
        return last.logits() if found is None else found

    def _logits(self, tokens: int) -> Iterator[Tensor]:
        """Of the last run's, some at a time."""
        last = self.cards[-1]
        for begin in range(0, tokens, TOKENS_OF_HEAD):
            rows = min(TOKENS_OF_HEAD, tokens - begin)
            with self._finishing():
                last.give_logits(begin, rows)
                last.wait()
            yield last.logits_of(rows).clone()

    def _run(
        self,
        x: Tensor,
        start: int,
        memory: Sequence[SequenceMemory],
        wanted: int,
        segment: Segment,
        sought: Sought | None,
    ) -> tuple[CardLayers, Segment]:
        """The last card that took part, and its part of the segment."""
        assert start + len(x) <= memory[0].capacity
        parts = list(self._parts(segment))
        first, *others = cards = [self.cards[number] for number, _ in parts]
        with self._finishing():
            for card in others:
                card.driver.enter()
                card.set_start(start)
            first.driver.enter()
            first.set_input(x, start)
            if sought is not None:
                cards[-1].set_sought(sought)
            for (number, own), card, behind in zip(parts, cards, [*others, None], strict=True):
                rows = wanted if behind is None else len(x)
                selects = sought is not None and behind is None
                card.give(len(x), memory[number], rows, own, behind, selects=selects)
            # In this order, as only a card itself says that it failed. None has waited for that.
            for card in cards:
                if others:
                    card.driver.enter()
                card.wait()
        return cards[-1], parts[-1][1]

    @contextlib.contextmanager
    def _finishing(self) -> Iterator[None]:
        """After an error or an interrupt, wait for what all cards were given, as far as they can be
        waited for: what it uses, or what a stream calls, may be changed from then on."""
        try:
            yield
        except BaseException:
            for card in self.cards:
                with contextlib.suppress(LocalR1Error):
                    card.driver.enter()
                    card.finish()
            raise

    def free(self) -> None:
        """A card that is lost frees nothing any more, and need not."""
        for card in self.cards:
            with contextlib.suppress(LocalR1Error):
                card.driver.enter()
                card.free()

    def close_drivers(self) -> None:
        for card in self.cards:
            card.driver.close()

    def _parts(self, segment: Segment) -> Iterator[tuple[int, Segment]]:
        """Each card's part of it, by the card's number. The last card's may be a head alone, or
        nothing where there is no other."""
        for number, card in enumerate(self.cards):
            first, last = max(segment.first, card.first), min(segment.last, card.last)
            is_last = segment.last == last
            if first < last or (is_last and number == len(self.cards) - 1):
                yield number, Segment(first, last, segment.without_mixture and is_last)
