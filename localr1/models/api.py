"""What a loaded model offers, whatever its architecture."""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from localr1.cache.sequence import Cache
from localr1.candidates import Candidates, Sought
from localr1.models.config import ModelConfig
from localr1.models.step import Step


class Model(Protocol):
    @property
    def config(self) -> ModelConfig: ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in memory; a tied matrix counts once."""
        ...

    def same_bits(self, num_tokens: int) -> bool:
        """Whether each token of a pass over so many has the bits that a pass of its own would give
        it."""
        ...

    def new_cache(self, limit: int) -> Cache[Any]:
        """An empty cache for at most `limit` positions, of the kind this model reads. Raises
        ContextError when the model was not made for so many."""
        ...

    def forward(self, step: Step, cache: Cache[Any]) -> Tensor:
        """Logits, float32 [1, vocabulary] of the last token, or [T, vocabulary] when asked.

        The cache gains the step's tokens if, and only if, this returns. Raises ContextError,
        MemoryLimitError, TokenizerError (a token id outside the vocabulary).
        """
        ...


@runtime_checkable
class SelectingModel(Model, Protocol):
    """One that finds the tokens which a draw is likely to be among where its logits are."""

    def select(self, step: Step, cache: Cache[Any], sought: Sought) -> Candidates | Tensor:
        """As `forward`, of the last token; what is sought of its logits, or all of them, as where
        one is not finite. `Candidates.all_logits` raises as `forward`, and the cache loses its
        tokens then."""
        ...
