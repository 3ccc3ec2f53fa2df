"""What attention keeps of one sequence: the first layers' part on cards, the rest in RAM."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from localr1.cache.sequence import Cache
from localr1.card.layers import SequenceMemory
from localr1.models.config import ModelConfig
from localr1.models.decoder import make_cache


class CardCache(Cache[Any]):
    """on_card: of the first layers, one part a card; None once a card is lost. What lies in RAM,
    keys and values or latents, has the numbers of its layers all the same, and grows as any cache
    does; a card's part has room for all positions from the beginning, so that addresses and grids
    never change."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        limit: int,
        on_card: Sequence[SequenceMemory],
    ) -> None:
        self.on_card: Sequence[SequenceMemory] | None = on_card
        self._first = sum(len(part.layers) for part in on_card)
        self._num_layers = config.num_layers
        self._kind = make_cache(replace(config, num_layers=1), dtype, limit)
        super().__init__(config.num_layers - self._first, limit)

    def _allocate(self, capacity: int) -> Any:
        return self._kind._allocate(capacity)

    @staticmethod
    def _tensors(layer: Any) -> tuple[Tensor, ...]:
        return (layer,) if isinstance(layer, Tensor) else (layer.k, layer.v)

    def layer(self, index: int) -> Any:
        return super().layer(index - self._first)

    @property
    def is_in_ram(self) -> bool:
        return self.on_card is None

    def leave_card(self) -> None:
        """A card is lost: the sequence begins anew, in RAM."""
        if self.on_card is None:
            return
        self.on_card, self._first, self.length = None, 0, 0
        self._start_anew(self._num_layers)
