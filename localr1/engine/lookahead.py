"""The next logits, with drafted tokens computed along: one pass may give several tokens.

The tokens are those that there would be without it, because a pass over several tokens gives each
the bits that passes of one give it (Model.same_bits), and every token is drawn from its own logits,
one after another, a draft being only a guess of what will be drawn (Leviathan et al. 2023, "Fast
inference from transformers via speculative decoding", with a draft that is certain of itself and
the same random numbers).
"""

import time
from collections.abc import Sequence

from torch import Tensor

from localr1.engine.counts import Counts
from localr1.engine.draft_length import LENGTHS, DraftLength
from localr1.engine.ngrams import NgramIndex
from localr1.engine.sequence import CachedSequence


class Lookahead:
    """history: what `sequence` has read. length: learned over all generations. counts: gains what
    was drafted and accepted."""

    def __init__(
        self,
        sequence: CachedSequence,
        history: Sequence[int],
        length: DraftLength,
        counts: Counts,
    ) -> None:
        self._sequence = sequence
        self._counts = counts
        self._length = length
        self._index = NgramIndex()
        self._index.extend(history)
        self._draft: list[int] = []
        self._run = 0
        self._rows: Tensor | None = None

    def logits_after(self, tokens: Sequence[int]) -> Tensor:
        """Logits [1, vocab] behind `tokens`, which come next."""
        self._index.extend(tokens)
        if self._draft and self._rows is not None:
            was_right = list(tokens) == self._draft[:1]
            if len(tokens) == 1:  # What closes a thought was nobody's guess.
                self._length.judged(self._run, was_right)
            if was_right:
                self._counts.accepted += 1
                self._sequence.confirm(self._draft.pop(0))
                self._rows = self._rows[1:]
                return self._rows[:1]
        self._draft_next(len(tokens))
        begin = time.perf_counter()
        self._rows = self._sequence.forward_with_draft(tokens, self._draft)
        if len(tokens) == 1:
            self._length.measured(len(self._draft), time.perf_counter() - begin)
        self._counts.drafted += len(self._draft)
        return self._rows[:1]

    def _draft_next(self, num_tokens: int) -> None:
        sequence = self._sequence
        room = sequence.cache.limit - len(sequence.ids) - num_tokens
        self._run, found = self._index.propose(min(LENGTHS[-1], room))
        self._draft = found[: self._length.choose(self._run)] if found else []
