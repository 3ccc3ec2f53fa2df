"""Keys and values of every position, kept as they are."""

import torch

from localr1.errors import ContextError, MemoryLimitError
from localr1.kernels.api import LayerCache

INITIAL_CAPACITY = 256
"""Positions the first reservation makes room for; doubled from there."""


class DenseCache:
    """One sequence's K/V cache: a layer holds k and v, [num_kv_heads, capacity, head_dim] each.

    `limit` is the context window in positions. Grow with `reserve`, fill `layer(i)` in place, then
    `advance`: a step that fails in between leaves the sequence as it was.
    """

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, limit: int
    ) -> None:
        if limit < 1:
            raise ContextError("context window", expected="at least 1 token", found=limit)
        self.limit = limit
        self.length = 0
        self._layers = [
            LayerCache(*(torch.empty(num_kv_heads, 0, head_dim, dtype=dtype) for _ in range(2)))
            for _ in range(num_layers)
        ]

    @property
    def capacity(self) -> int:
        """Positions every layer has room for."""
        return min(layer.k.shape[1] for layer in self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self._layers)

    def layer(self, index: int) -> LayerCache:
        """Valid until the next `reserve`."""
        return self._layers[index]

    def reserve(self, num_tokens: int) -> None:
        """Make room for so many more tokens.

        Raises ContextError when they do not fit the window and MemoryLimitError when they do not
        fit the machine; the cached tokens survive both.
        """
        needed = self.length + num_tokens
        if needed > self.limit:
            raise ContextError(
                "context window",
                expected=f"at most {self.limit} tokens",
                found=f"{self.length} cached and {num_tokens} new",
                fix="Shorten the conversation or choose a larger context.",
            )
        if needed <= self.capacity:
            return
        capacity = min(max(2 * self.capacity, needed, INITIAL_CAPACITY), self.limit)
        # Layer by layer: at its peak this holds one layer twice, not the whole cache.
        for index, layer in enumerate(self._layers):
            if layer.k.shape[1] < capacity:
                self._layers[index] = self._grown(layer, capacity)

    def advance(self, num_tokens: int) -> None:
        """The reserved positions of all layers have been filled."""
        assert 0 <= num_tokens <= self.capacity - self.length
        self.length += num_tokens

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on; the room is kept."""
        assert 0 <= length <= self.length
        self.length = length

    def _grown(self, layer: LayerCache, capacity: int) -> LayerCache:
        heads, _, head_dim = layer.k.shape
        try:
            k, v = (torch.empty(heads, capacity, head_dim, dtype=layer.k.dtype) for _ in range(2))
        except RuntimeError as error:  # What torch's CPU allocator raises; nothing else can fail.
            size = 2 * heads * capacity * head_dim * layer.k.element_size() * len(self._layers)
            raise MemoryLimitError(
                "key/value cache",
                expected=f"{size / 2**30:.1f} GiB for {capacity} tokens",
                found="less free memory",
                fix="Choose a smaller context.",
            ) from error
        k[:, : self.length] = layer.k[:, : self.length]
        v[:, : self.length] = layer.v[:, : self.length]
        return LayerCache(k, v)
