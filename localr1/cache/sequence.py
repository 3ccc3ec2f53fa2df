"""What the caches of all attention kinds share: one sequence, a window, room that doubles."""

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from torch import Tensor

from localr1.errors import ContextError, MemoryLimitError

INITIAL_CAPACITY = 256
"""Positions the first reservation makes room for; doubled from there."""

Layer = TypeVar("Layer")


class Cache(ABC, Generic[Layer]):
    """What attention keeps of one sequence, layer by layer.

    `limit` is the context window in positions. Grow with `reserve`, fill `layer(i)` in place, then
    `advance`: a step that fails in between leaves the sequence as it was.
    """

    def __init__(self, num_layers: int, limit: int) -> None:
        if limit < 1:
            raise ContextError("context window", expected="at least 1 token", found=limit)
        self.limit = limit
        self.length = 0
        self._start_anew(num_layers)

    def _start_anew(self, num_layers: int) -> None:
        self._layers = [self._allocate(0) for _ in range(num_layers)]
        one = self._tensors(self._allocate(1))
        self.position_bytes = num_layers * sum(tensor.nbytes for tensor in one)
        """What one position takes in all layers together."""

    @abstractmethod
    def _allocate(self, capacity: int) -> Layer:
        """A layer with room for so many positions, its values undefined."""

    @staticmethod
    @abstractmethod
    def _tensors(layer: Layer) -> tuple[Tensor, ...]:
        """A layer's tensors [..., capacity, values]."""

    @property
    def capacity(self) -> int:
        """Positions every layer has room for."""
        return min((self._capacity(layer) for layer in self._layers), default=self.limit)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(tensor.nbytes for layer in self._layers for tensor in self._tensors(layer))

    def layer(self, index: int) -> Layer:
        """Valid until the next `reserve`."""
        return self._layers[index]

    def tensors(self, index: int) -> tuple[Tensor, ...]:
        """A layer's tensors [..., capacity, values], valid until the next `reserve`."""
        return self._tensors(self._layers[index])

    @property
    def is_in_ram(self) -> bool:
        """Whether `tensors` has all of it."""
        return True

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def form(self) -> str:
        """What a position's values are: the kind of cache, and the dtypes and sizes of a layer."""
        tensors = self.tensors(0)
        parts = [
            f"{tensor.dtype} {list(tensor.shape[:-2])}x{tensor.shape[-1]}" for tensor in tensors
        ]
        return f"{type(self).__name__} {self.num_layers} layers of " + ", ".join(parts)

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
            if self._capacity(layer) < capacity:
                self._layers[index] = self._grown(layer, capacity)

    def advance(self, num_tokens: int) -> None:
        """The reserved positions of all layers have been filled."""
        assert 0 <= num_tokens <= self.capacity - self.length
        self.length += num_tokens

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on; the room is kept."""
        assert 0 <= length <= self.length
        self.length = length

    def _capacity(self, layer: Layer) -> int:
        return self._tensors(layer)[0].shape[-2]

    def _grown(self, layer: Layer, capacity: int) -> Layer:
        try:
            grown = self._allocate(capacity)
        except RuntimeError as error:  # What torch's CPU allocator raises; nothing else can fail.
            size = self.position_bytes * capacity
            raise MemoryLimitError(
                "key/value cache",
                expected=f"{size / 2**30:.1f} GiB for {capacity} tokens",
                found="less free memory",
                fix="Choose a smaller context.",
            ) from error
        for old, new in zip(self._tensors(layer), self._tensors(grown), strict=True):
            new[..., : self.length, :] = old[..., : self.length, :]
        return grown
