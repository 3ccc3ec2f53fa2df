"""What multi-head latent attention keeps of a position: the latent and one rotated key."""

import torch
from torch import Tensor

from localr1.cache.sequence import Cache
from localr1.kernels.cache_rows import row_width


class LatentCache(Cache[Tensor]):
    """A layer is one tensor [capacity, row of latent_size + rope_size values] (dtype as for
    DenseCache): the normed latent, from which each
    head's key and value follow, then the rotated key that all heads share (DeepSeek-AI 2024,
    "DeepSeek-V2", section 2.1).

    At R1's sizes 512 + 64 = 576 values, where the expanded keys and values of its 128 heads would
    be 128 * (192 + 128) = 40,960. The two lie side by side so that absorbed attention scores a
    position with one product and reads it once.
    """

    def __init__(
        self, num_layers: int, latent_size: int, rope_size: int, dtype: torch.dtype, limit: int
    ) -> None:
        self._width = row_width(latent_size + rope_size, dtype)
        self._dtype = dtype
        super().__init__(num_layers, limit)

    def _allocate(self, capacity: int) -> Tensor:
        return torch.empty(capacity, self._width, dtype=self._dtype)

    @staticmethod
    def _tensors(layer: Tensor) -> tuple[Tensor, ...]:
        return (layer,)
