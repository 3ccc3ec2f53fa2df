"""What a model has read of one conversation: its cache, and whose keys and values that holds."""

from collections.abc import Sequence

import torch
from torch import Tensor

from localr1.candidates import Candidates, Sought
from localr1.models.api import Model, SelectingModel
from localr1.models.step import Step


class CachedSequence:
    """A model and the cache of one sequence. limit: its window in tokens.

    ids: of the tokens that are read for good, a prefix of what the cache holds. Where an interrupt
    falls between the model's return and the note of it, the cache is the longer one; whatever comes
    next cuts it.
    """

    def __init__(self, model: Model, limit: int) -> None:
        self.model = model
        self._selecting = model if isinstance(model, SelectingModel) else None
        self.cache = model.new_cache(limit)
        self.ids: list[int] = []

    def reuse(self, ids: Sequence[int]) -> int:
        """Cut to the longest prefix shared with `ids`; returns its length."""
        limit = min(len(ids), len(self.ids), self.cache.length)
        common = next((i for i in range(limit) if ids[i] != self.ids[i]), limit)
        del self.ids[common:]
        self.cache.truncate(common)
        return common

    def forward(self, ids: Sequence[int]) -> Tensor:
        """Logits [1, vocab] of the last of `ids`, which are read now."""
        logits = self.model.forward(self._step(ids), self.cache)
        self.ids.extend(ids)
        return logits

    def select(self, ids: Sequence[int], sought: Sought) -> Candidates | Tensor:
        """Of these logits what is sought, where the model finds that by itself."""
        if self._selecting is None:
            return self.forward(ids)
        found = self._selecting.select(self._step(ids), self.cache, sought)
        self.ids.extend(ids)
        return found

    def _step(self, ids: Sequence[int]) -> Step:
        self._cut()
        return Step(torch.tensor(ids, dtype=torch.int64), len(self.ids))

    def forward_with_draft(self, ids: Sequence[int], draft: Sequence[int]) -> Tensor:
        """Logits [1 + draft, vocab] of the last of `ids`, which are read now, and of each token of
        a draft that may follow, which `confirm` reads for good."""
        if not draft:
            return self.forward(ids)
        self._cut()
        step = Step(torch.tensor([*ids, *draft]), len(self.ids), all_logits=True)
        logits = self.model.forward(step, self.cache)
        self.ids.extend(ids)
        return logits[len(ids) - 1 :]

    def confirm(self, token: int) -> None:
        """The next token of the draft came indeed."""
        assert self.cache.length > len(self.ids)
        self.ids.append(token)

    def _cut(self) -> None:
        """To what was read for good."""
        if self.cache.length > len(self.ids):
            self.cache.truncate(len(self.ids))
