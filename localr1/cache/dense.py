"""Keys and values of every position, kept as they are."""

import torch
from torch import Tensor

from localr1.cache.sequence import Cache
from localr1.kernels.api import LayerCache
from localr1.kernels.cache_rows import row_width


class DenseCache(Cache[LayerCache]):
    """A layer holds k and v, [num_kv_heads, capacity, row of head_dim values] each. dtype: float32,
    float16, or int8 for rows in 8 bits (kernels/cache_rows.py)."""

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, limit: int
    ) -> None:
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim
        self._dtype = dtype
        super().__init__(num_layers, limit)

    def _allocate(self, capacity: int) -> LayerCache:
        shape = (self._num_kv_heads, capacity, row_width(self._head_dim, self._dtype))
        return LayerCache(*(torch.empty(shape, dtype=self._dtype) for _ in range(2)))

    @staticmethod
    def _tensors(layer: LayerCache) -> tuple[Tensor, ...]:
        return layer.k, layer.v
