"""A run of a model's layers on a card: what lies there, and giving it to the card."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from localr1.candidates import Candidates, Sought
from localr1.card.attention import attention, latent_attention
from localr1.card.mixture import CardExperts, Exchange, mixture
from localr1.card.model import ModelHead, ModelLayer, PlacedLayer, place_rope
from localr1.card.program import Program, Streams
from localr1.card.region import Region, bytes_of
from localr1.card.step import CardRope, LayerMemory, StepLaunches
from localr1.card.weights import CardAttention, CardHead, CardMixture
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
from localr1.kernels.api import RopeTable
from localr1.kernels.gpu_driver import Driver

STAGING_BYTES: Final = 4 << 20


@dataclass(eq=False)
class SequenceMemory:
    """The card's part of a cache. capacity: positions. programs: that use it, by tokens, results
    that are wanted, layers, how far attention reaches, whether another card goes on, and whether
    candidates are sought; of those that are run again and again."""

    layers: list[LayerMemory]
    capacity: int
    programs: "dict[tuple[int, int, Segment, int, bool, bool], Program]" = field(
        default_factory=dict
    )


class Segment(NamedTuple):
    """Layers first .. last - 1 of the model. without_mixture: the last one is a mixture, which is
    left out."""

    first: int
    last: int
    without_mixture: bool = False


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
    """rope: of `capacity` positions at least, the longest a cache may be. dtype: of caches. first:
    the model's number of the first layer that will lie here. Takes what every run needs of the card
    when it is made, and raises MemoryLimitError where there is no room; then `add` and `add_head`
    take more, layer by layer, and `ready` ends it. Used by one thread at a time, which has entered
    the driver.

    A run is `set_input` or `set_start`, `give`, `wait` and `output`; localr1/card/chain.py does all
    of it. Its input comes from the host, or from the card before, which writes it.
    """

    def __init__(
        self,
        driver: Driver,
        sizes: Sizes,
        rope: RopeTable,
        dtype: torch.dtype,
        first: int = 0,
    ) -> None:
        self.sizes = sizes
        self.driver = driver
        self.first = first
        self._half = dtype == torch.float16
        self._placed = _Placed(driver)
        self._layers: list[PlacedLayer] = []
        self._sources: list[ModelLayer] = []
        self._head: CardHead | None = None
        self._experts: dict[int, CardExperts] = {}
        self._own: list[LayerMemory] = []
        self._free: list[SequenceMemory] = []
        self._streams = Streams.of(driver)
        self._staging = Staging(driver, STAGING_BYTES)
        self._host = HostMemory(driver)
        self._handed_on = driver.event()
        self._is_running = False
        try:
            self._work: Workspace = self._filled(lambda region: place_workspace(sizes, region))
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
        self._host.allocate("selection", sizes.selection.nbytes)
        self._exchange: Exchange | None = None
        if sizes.experts:
            self._exchange = Exchange.of(self._host, sizes.hidden, sizes.chosen)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def last(self) -> int:
        """The number behind the last layer's."""
        return self.first + self.num_layers

    @property
    def mixtures(self) -> list[int]:
        """The numbers of the layers that are."""
        return [
            i
            for i, layer in enumerate(self._layers, self.first)
            if isinstance(layer.mlp, CardMixture)
        ]

    @property
    def has_head(self) -> bool:
        return self._head is not None

    @property
    def nbytes(self) -> int:
        """Of the card's memory."""
        return sum(self._placed.sizes)

    def add(self, layer: ModelLayer) -> None:
        """The next layer's weights, and its part of a cache. Raises MemoryLimitError; what is there
        stays in use then."""
        before = len(self._placed.addresses)
        try:
            placed: PlacedLayer = self._filled(layer.place)
            memory = self._cache(layer)
        except MemoryLimitError:
            self._placed.free_from(before)
            raise
        self._layers.append(placed)
        self._sources.append(layer)
        self._own.append(memory)

    def add_head(self, head: ModelHead) -> None:
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

    def use_experts(self, experts: dict[int, CardExperts]) -> None:
        """Of every mixture, by its number, before the first token is decoded."""
        assert sorted(experts) == self.mixtures
        self._experts = experts

    def sequence(self) -> SequenceMemory:
        """Memory for a sequence of up to `sizes.capacity` positions; to be given back with
        `give_back`. Raises MemoryLimitError where other sequences have taken it all."""
        if self._free:
            return self._free.pop()
        before = len(self._placed.addresses)
        try:
            own = [self._cache(layer) for layer in self._sources]
        except MemoryLimitError:
            self._placed.free_from(before)
            raise
        return SequenceMemory(own, self.sizes.capacity)

    def give_back(self, memory: SequenceMemory) -> None:
        self._free.append(memory)

    def set_start(self, start: int) -> None:
        """The position of the next run's first token. A run that an interrupt kept from its end is
        waited for, as it may still read its own."""
        if self._is_running:
            self.finish()
        self._host.tensor("input", torch.int32, 1)[0] = start

    def set_sought(self, sought: Sought) -> None:
        """Of the next run, whose position is set."""
        asked = self._host.tensor("input", torch.float32, 3)
        asked[1], asked[2] = sought.depth, sought.inverse_temperature

    def set_input(self, x: Tensor, start: int) -> None:
        """x float32 [T, hidden], what the layer before made of tokens from position `start` on."""
        self.set_start(start)
        self._input(len(x))[:] = x

    def give(
        self,
        tokens: int,
        memory: SequenceMemory,
        wanted: int,
        segment: Segment,
        following: "CardLayers | None" = None,
        *,
        selects: bool = False,
    ) -> None:
        """So many tokens of the input, at most `sizes.most_tokens`, go through these layers and
        join the cache. What the last `wanted` of them have become is the output; or the input of
        `following`, a card that goes on behind it, without the host waiting in between. Mixtures
        within a segment take one token. selects: behind a head, of one token; `candidates` is the
        output."""
        assert not selects or (wanted == 1 and self.ends_in_head(segment))
        program = self._program(tokens, memory, wanted, segment, following, selects)
        self._is_running = True
        program.run()
        if following is not None:
            self.driver.record(self._handed_on, self._streams.main)
            following.driver.enter()
            following.driver.wait_for(self._handed_on, following._streams.main)

    def give_logits(self, first: int, rows: int) -> None:
        """Logits of so many tokens from the `first` one of the last run on, which went through all
        layers and of which nothing was wanted, are the next output."""
        assert self._head is not None
        program = Program(self.driver, self._streams, captured=False)
        step = StepLaunches(program, self._work, self._rope, rows, self.sizes.capacity)
        step.head(self._head, first)
        output = self.logits_of(rows)
        program.copy_out(output.data_ptr(), self._work.logits, output.nbytes)
        self._is_running = True
        program.run()

    def wait(self) -> None:
        """Until all is done that was given."""
        self.driver.synchronize(self._streams.main)
        self._is_running = False

    def finish(self) -> None:
        """`wait`, also for what was given in part, and joins no stream."""
        self.driver.synchronize(self._streams.side)
        self.wait()

    def output(self, rows: int, segment: Segment) -> Tensor:
        """float32 [rows, hidden], or at the end of all layers, with a head, the logits of these
        tokens, at most TOKENS_OF_HEAD; in memory that the next run uses again."""
        if self.ends_in_head(segment):
            return self.logits_of(rows)
        return self._host.tensor("output", torch.float32, rows, self.sizes.hidden)

    def logits_of(self, rows: int) -> Tensor:
        """The output, where that is logits."""
        return self._host.tensor("output", torch.float32, rows, self.sizes.vocabulary)

    def candidates(self, sought: Sought) -> Candidates | None:
        """Of a run that selects. None where a logit is not finite, or there are too many."""
        selection = self.sizes.selection
        found = self._host.tensor("selection", torch.int32, selection.words)
        return selection.read(found.numpy(), sought, self.logits)

    def logits(self) -> Tensor:
        """As `output`, of a run that selects, which leaves them on the card. Until the next run."""
        self.driver.enter()
        found = self.logits_of(1)
        self.driver.copy_out(found.data_ptr(), self._work.logits, found.nbytes, self._streams.main)
        self.wait()
        return found

    @property
    def stream(self) -> Any:
        """That runs are given to."""
        return self._streams.main

    def free(self) -> None:
        self._placed.free_from(0)
        self._staging.free()
        self._host.free()

    def _input(self, tokens: int) -> Tensor:
        whole = self._host.tensor(
            "input", torch.float32, START_BYTES // FLOAT + tokens * self.sizes.hidden
        )
        return whole[START_BYTES // FLOAT :].view(tokens, self.sizes.hidden)

    def ends_in_head(self, segment: Segment) -> bool:
        return self.has_head and segment.last == self.last and not segment.without_mixture

    def _program(
        self,
        tokens: int,
        memory: SequenceMemory,
        wanted: int,
        segment: Segment,
        following: "CardLayers | None",
        selects: bool,
    ) -> Program:
        """Kept for one token, and for as many as a run takes: of a prompt all runs but the last."""
        if tokens not in (1, self.sizes.most_tokens):
            return self._noted(tokens, memory, wanted, segment, following, selects, captured=False)
        key = tokens, wanted, segment, self._reach(tokens), following is None, selects
        if key not in memory.programs:
            captured = all(
                each._host.is_all_pinned for each in (self, following) if each is not None
            )
            memory.programs[key] = self._noted(
                tokens, memory, wanted, segment, following, selects, captured=captured
            )
        return memory.programs[key]

    def _noted(
        self,
        tokens: int,
        memory: SequenceMemory,
        wanted: int,
        segment: Segment,
        following: "CardLayers | None",
        selects: bool,
        *,
        captured: bool,
    ) -> Program:
        work, row = self._work, FLOAT * self.sizes.hidden
        program = Program(self.driver, self._streams, captured=captured)
        source = self._host.tensor("input", torch.int32, 1).data_ptr()
        program.copy_in(work.start, source, START_BYTES + tokens * row)
        step = StepLaunches(program, work, self._rope, tokens, self._reach(tokens))
        for index in range(segment.first, segment.last):
            is_left_out = segment.without_mixture and index == segment.last - 1
            own = memory.layers[index - self.first]
            self._layer(step, index, own, with_mlp=not is_left_out)
        if not wanted:
            return program
        result = work.x + (tokens - wanted) * row
        if self.ends_in_head(segment):
            assert self._head is not None
            assert wanted <= TOKENS_OF_HEAD
            last = StepLaunches(program, work, self._rope, wanted, self.sizes.capacity)
            last.head(self._head, tokens - wanted)
            result = work.logits
            if selects:
                last.select(self.sizes.selection)
                found = self._host.tensor("selection", torch.int32, self.sizes.selection.words)
                program.copy_out(found.data_ptr(), work.selection, found.nbytes)
                return program
        output = self.output(wanted, segment) if following is None else following._input(wanted)
        program.copy_out(output.data_ptr(), result, output.nbytes)
        return program

    def _reach(self, tokens: int) -> int:
        """Of the run that is about to begin (`Sizes.reach`); of one token the whole cache, so that
        its graph is made once."""
        if tokens == 1:
            return self.sizes.capacity
        return self.sizes.reach(int(self._host.tensor("input", torch.int32, 1)[0]) + tokens)

    def _layer(self, step: StepLaunches, index: int, memory: LayerMemory, with_mlp: bool) -> None:
        layer = self._layers[index - self.first]
        if isinstance(layer.attention, CardAttention):
            attention(step, layer.attention, memory)
        else:
            latent_attention(step, layer.attention, memory)
        if not with_mlp:
            return
        if isinstance(layer.mlp, CardMixture):
            assert self._exchange is not None
            mixture(step, layer.mlp, self._experts[index], self._exchange)
        else:
            step.mlp(layer.mlp)

    def _filled(self, place: Callable[[Region], Any]) -> Any:
        """What `place` makes of an allocation that is as large as it needs."""
        base = self._placed.allocate(bytes_of(place))
        return place(Region(base, self._copy))

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        self._staging.copy_in(target, source, nbytes, self._streams.main)

    def _cache(self, layer: ModelLayer) -> LayerMemory:
        placed: LayerMemory = self._filled(
            lambda region: layer.place_cache(self.sizes.capacity, self._half, region)
        )
        return placed
