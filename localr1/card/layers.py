"""The first layers of a model, or all of it, on a card: what lies there, and running it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from localr1.card.dense import CardRope, LayerMemory, StepLaunches
from localr1.card.program import Program
from localr1.card.region import Region, bytes_of
from localr1.card.weights import (
    CardAttention,
    CardHead,
    CardMlp,
    place_attention,
    place_linear,
    place_mlp,
)
from localr1.card.workspace import (
    FLOAT,
    START_BYTES,
    TOKENS_OF_HEAD,
    Sizes,
    Workspace,
    place_workspace,
)
from localr1.errors import MemoryLimitError
from localr1.experts.card_memory import HostMemory, Staging
from localr1.kernels.api import AttentionWeights, MlpWeights, RopeTable
from localr1.kernels.gpu_driver import Driver
from localr1.layers.linear import PackedLinear

STAGING_BYTES: Final = 4 << 20


@dataclass(frozen=True)
class DenseLayer:
    """A layer that a card can compute, as the CPU has it."""

    attention: AttentionWeights
    mlp: MlpWeights

    def place(self, region: Region) -> tuple[CardAttention, CardMlp]:
        return place_attention(self.attention, region), place_mlp(self.mlp, region)


@dataclass(frozen=True)
class Head:
    """norm: [hidden], before the matrix."""

    norm: Tensor
    matrix: PackedLinear
    eps: float

    def place(self, region: Region) -> CardHead:
        matrix = place_linear(self.matrix.weight, self.matrix.bias, region)
        return CardHead(region.tensor(self.norm), matrix, self.eps)


@dataclass(eq=False)
class SequenceMemory:
    """The card's part of a cache. capacity: positions. decode: programs of one token that use it,
    by how many results are wanted, once there are any."""

    layers: list[LayerMemory]
    capacity: int
    decode: dict[int, Program] = field(default_factory=dict)


@dataclass
class _Placed:
    """The card's allocations, freed together."""

    driver: Driver
    addresses: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def allocate(self, nbytes: int) -> int:
        self.addresses.append(self.driver.allocate(nbytes))
        self.sizes.append(nbytes)
        return self.addresses[-1]

    def free_from(self, count: int) -> None:
        while len(self.addresses) > count:
            self.driver.free(self.addresses.pop())
            self.sizes.pop()


class CardLayers:
    """hidden: of the model. rope: of `capacity` positions at least, the longest a cache may be.
    dtype: of caches. Takes what every run needs of the card when it is made, and raises
    MemoryLimitError where there is no room; then `add` and `add_head` take more, layer by layer.
    Used by one thread at a time, which has entered the driver."""

    def __init__(self, driver: Driver, sizes: Sizes, rope: RopeTable, dtype: torch.dtype) -> None:
        self.sizes = sizes
        self._driver = driver
        self._half = dtype == torch.float16
        self._placed = _Placed(driver)
        self._layers: list[tuple[CardAttention, CardMlp]] = []
        self._head: CardHead | None = None
        self._own: list[LayerMemory] = []
        self._free: list[SequenceMemory] = []
        self._stream = driver.stream()
        self._staging = Staging(driver, STAGING_BYTES)
        self._host = HostMemory(driver)
        self._is_running = False
        try:
            self._workspace: Workspace = self._filled(lambda region: place_workspace(sizes, region))
            self._rope: CardRope = self._filled(
                lambda region: place_rope(rope, sizes.capacity, region)
            )
        except MemoryLimitError:
            self.free()
            raise
        hidden = FLOAT * sizes.most_tokens * sizes.hidden
        logits = FLOAT * min(sizes.most_tokens, TOKENS_OF_HEAD) * sizes.vocabulary
        self._host.allocate("input", START_BYTES + hidden)
        self._host.allocate("output", max(hidden, logits))

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def has_head(self) -> bool:
        return self._head is not None

    @property
    def nbytes(self) -> int:
        """Of the card's memory."""
        return sum(self._placed.sizes)

    def add(self, layer: DenseLayer) -> None:
        """The next layer's weights, and its part of a cache. Raises MemoryLimitError; what is there
        stays in use then."""
        before = len(self._placed.addresses)
        try:
            placed: tuple[CardAttention, CardMlp] = self._filled(layer.place)
            memory = self._cache(layer.attention)
        except MemoryLimitError:
            self._placed.free_from(before)
            raise
        self._layers.append(placed)
        self._own.append(memory)

    def add_head(self, head: Head) -> None:
        """Behind the last layer. Raises MemoryLimitError as `add`."""
        before = len(self._placed.addresses)
        try:
            self._head = self._filled(head.place)
        except MemoryLimitError:
            self._placed.free_from(before)
            raise

    def ready(self) -> None:
        """All layers are there."""
        self._free.append(SequenceMemory(self._own, self.sizes.capacity))

    def sequence(self) -> SequenceMemory:
        """Memory for a sequence of up to `sizes.capacity` positions; to be given back with
        `give_back`. Raises MemoryLimitError where other sequences have taken it all."""
        if self._free:
            return self._free.pop()
        before = len(self._placed.addresses)
        try:
            own = [self._cache(attention) for attention, _ in self._layers]
        except MemoryLimitError:
            self._placed.free_from(before)
            raise
        return SequenceMemory(own, self.sizes.capacity)

    def give_back(self, memory: SequenceMemory) -> None:
        self._free.append(memory)

    def run(self, x: Tensor, start: int, memory: SequenceMemory, wanted: int) -> Tensor:
        """x float32 [T, hidden], the embeddings of tokens from position `start` on, T at most
        `sizes.most_tokens`. They join the cache. Returns what the last `wanted` tokens have become,
        float32 [wanted, hidden], or with a head their logits, of which at most TOKENS_OF_HEAD are
        computed at once; in memory that the next run uses again. The host waits once."""
        tokens = len(x)
        assert start + tokens <= memory.capacity
        if self._is_running:  # An interrupt came before its end; it may still read the input.
            self._driver.synchronize(self._stream)
        self._host.tensor("input", torch.int32, 1)[0] = start
        self._input(tokens)[:] = x
        program = self._program(tokens, memory, wanted)
        self._is_running = True
        program.run()
        self._driver.synchronize(self._stream)
        self._is_running = False
        return self._output(wanted) if wanted else torch.empty(0)

    def free(self) -> None:
        self._placed.free_from(0)
        self._staging.free()
        self._host.free()

    def _input(self, tokens: int) -> Tensor:
        whole = self._host.tensor(
            "input", torch.float32, START_BYTES // FLOAT + tokens * self.sizes.hidden
        )
        return whole[START_BYTES // FLOAT :].view(tokens, self.sizes.hidden)

    def _output(self, rows: int) -> Tensor:
        columns = self.sizes.vocabulary if self._head is not None else self.sizes.hidden
        return self._host.tensor("output", torch.float32, rows, columns)

    def _program(self, tokens: int, memory: SequenceMemory, wanted: int) -> Program:
        """Kept for one token, where a graph spares the host most."""
        if tokens > 1:
            return self._noted(tokens, memory, wanted, captured=False)
        if wanted not in memory.decode:
            captured = self._host.is_pinned("input") and self._host.is_pinned("output")
            memory.decode[wanted] = self._noted(tokens, memory, wanted, captured=captured)
        return memory.decode[wanted]

    def _noted(
        self, tokens: int, memory: SequenceMemory, wanted: int, *, captured: bool
    ) -> Program:
        work, sizes = self._workspace, self.sizes
        program = Program(self._driver, self._stream, captured=captured)
        source = self._host.tensor("input", torch.int32, 1).data_ptr()
        row = FLOAT * sizes.hidden
        program.copy_in(work.start, source, START_BYTES + tokens * row)
        launches = StepLaunches(program, work, self._rope, tokens)
        for (attention, mlp), cache in zip(self._layers, memory.layers, strict=True):
            launches.attention(attention, cache)
            launches.mlp(mlp)
        if not wanted:
            return program
        result = work.x + (tokens - wanted) * row
        if self._head is not None:
            assert wanted <= TOKENS_OF_HEAD
            StepLaunches(program, work, self._rope, wanted).head(self._head, tokens - wanted)
            result = work.logits
        output = self._output(wanted)
        program.copy_out(output.data_ptr(), result, output.nbytes)
        return program

    def _filled(self, place: Callable[[Region], Any]) -> Any:
        """What `place` makes of an allocation that is as large as it needs."""
        base = self._placed.allocate(bytes_of(place))
        return place(Region(base, self._copy))

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        self._staging.copy_in(target, source, nbytes, self._stream)

    def _cache(self, attention: AttentionWeights | CardAttention) -> LayerMemory:
        shape = attention.num_kv_heads, attention.head_dim
        placed: LayerMemory = self._filled(
            lambda region: place_cache(shape, self.sizes.capacity, self._half, region)
        )
        return placed


def place_cache(shape: tuple[int, int], capacity: int, half: bool, region: Region) -> LayerMemory:
    """shape: key/value heads and values of each."""
    kv_heads, dim = shape
    nbytes = (2 if half else FLOAT) * kv_heads * capacity * dim
    return LayerMemory(region.reserve(nbytes), region.reserve(nbytes), capacity, half)


def place_rope(table: RopeTable, capacity: int, region: Region) -> CardRope:
    cos, sin = (each[:capacity].contiguous() for each in (table.cos, table.sin))
    return CardRope(region.tensor(cos), region.tensor(sin), cos.shape[1])
