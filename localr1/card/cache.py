"""The keys and values of one sequence, those of the first layers on the card, the rest in RAM."""

import torch

from localr1.cache.dense import DenseCache
from localr1.card.layers import SequenceMemory
from localr1.kernels.api import LayerCache
from localr1.models.config import ModelConfig


class CardCache(DenseCache):
    """on_card: of the first layers; of use to CardLayers only. What lies in RAM has the numbers of
    its layers all the same. It grows as any cache does; the card's part has room for `limit`
    positions from the beginning, so that addresses and grids never change."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, limit: int, on_card: SequenceMemory
    ) -> None:
        self.on_card: SequenceMemory | None = on_card
        self._first = len(on_card.layers)
        self._num_layers = config.num_layers
        super().__init__(
            config.num_layers - self._first, config.num_kv_heads, config.head_dim, dtype, limit
        )

    def layer(self, index: int) -> LayerCache:
        return super().layer(index - self._first)

    def leave_card(self) -> None:
        """The card is lost: the sequence begins anew, in RAM."""
        if self.on_card is None:
            return
        self.on_card, self._first, self.length = None, 0, 0
        self._start_anew(self._num_layers)
