"""The experts of a model, wherever they lie: in devices' memory, in RAM, or in their files.

Each layer's routed experts are an ExpertSource (layers/moe.py) that asks the store. What a token
gets does not depend on where its experts were computed: every backend gives the same bits under the
arithmetic contract, and the outputs are combined in the router's order (docs/arithmetic.md).

A pass (a token of decode, a chunk of prefill) goes through a layer like this: reads are begun for
the experts that are only in their files; the device computes those it holds, and copies over those
that are worth it; the CPU meanwhile computes those in RAM, then each that arrives from its file;
the outputs are combined (layer_compute.py). While that runs, the next layer's router guesses what
it will need, and reads begin ahead (read_ahead.py). Between passes the policy moves experts into
the device (hot.py), and what had to make room there back into RAM (ram.py). What was chosen, and
what all that took, is counted (accounting.py).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localr1.cgroup import available_memory
from localr1.errors import DeviceError, MemoryLimitError
from localr1.experts.accounting import Accounting
from localr1.experts.beneath import Beneath
from localr1.experts.choices import PassChoices
from localr1.experts.device import Device
from localr1.experts.hot import DeviceTier
from localr1.experts.hot_set import HotSet, learn
from localr1.experts.layer_compute import LayerCompute
from localr1.experts.placement import least_slots_for
from localr1.experts.policy import Ranking, make_ranking
from localr1.experts.ram import ExpertFiles, RamTier
from localr1.experts.rates import measure_rates, measure_reads
from localr1.experts.read_ahead import ReadAhead
from localr1.experts.residency import ABSENT, Residency
from localr1.experts.schedule import Rates
from localr1.experts.store_options import INSERT_CAP, Layer, StoreOptions
from localr1.experts.tiers import DeviceTiers
from localr1.experts.trial import Trial
from localr1.experts.usage import ExpertUsage, Span
from localr1.kernels.api import Routing
from localr1.kernels.host_mixtures import HostMixtures, HostResult
from localr1.kernels.native import NativeKernels
from localr1.kernels.native_experts import NativeExperts, SlotArena

LOW_MEMORY: Final = 192 << 20
"""Bytes left to the whole system below which slots are given back."""
PASSES_BETWEEN_LOOKS: Final = 16


class ExpertStore:
    """Made once a model is known, opened once its layers are, then used by one engine.

    kernels: compute what lies in RAM. files: where experts come from. homes: by layer, the number
    of the device that may hold its experts. Raises what reading raises at the token that needed it,
    and can be used again afterwards; so it can after a DeviceError, without devices.
    """

    def __init__(
        self,
        kernels: NativeKernels,
        files: ExpertFiles,
        layers: Sequence[Layer],
        devices: Sequence[Device],
        homes: Sequence[int],
        options: StoreOptions,
    ) -> None:
        assert layers
        self.usage = ExpertUsage()
        self.devices = list(devices)
        self.options = options
        self._kernels = kernels
        self._files = files
        self._layers = list(layers)
        self._num_experts = layers[0].num_experts
        self._per_token = layers[0].router.rule.experts_per_token
        assert all(layer.num_experts == self._num_experts for layer in layers)
        self._banks = [self._bank(layer) for layer in layers]
        self.slot_bytes = max(int(bank.layout.nbytes) for bank in self._banks)
        shape = len(layers), self._num_experts
        self.counts = np.zeros(shape, np.int64)
        """How many tokens chose each expert, [layers, experts]."""
        self._ranking: Ranking = make_ranking(options.policy, *shape)
        self._on_device = on_device = np.zeros(shape, bool)
        beneath = Beneath(self._ranking, on_device)
        cold = Residency(*shape, 0, beneath, insert_cap=0)
        self.ram = RamTier(
            SlotArena(self.slot_bytes),
            cold,
            [bank.table for bank in self._banks],
            files,
            self.usage,
            options.read_threads,
        )
        self.hot: DeviceTiers | None = None
        if devices:
            tiers = [self._tier(number, homes, beneath) for number in range(len(devices))]
            self.hot = DeviceTiers(tiers, homes)
        self._trial = Trial()
        self._pass_begin = 0.0
        self._pass_tokens = 0
        self._choices = PassChoices(self.counts)
        self._accounting = accounting = Accounting(
            self.usage, self._choices, self._ranking, on_device, self.ram, self.hot
        )
        read_ahead = ReadAhead(
            kernels, self._layers, self.ram, on_device, self._reads_ahead, accounting.tell
        )
        self._compute = LayerCompute(
            kernels, self._banks, self.ram, self.hot, on_device, read_ahead, accounting
        )
        self.is_complete = False
        """Whether all experts lie in RAM, so that nothing is ever moved."""
        self.available_memory: Callable[[], int] = available_memory

    @property
    def _least_slots(self) -> int:
        return least_slots_for(self._per_token, self.num_experts)

    @property
    def num_experts(self) -> int:
        """Of all layers."""
        return len(self._layers) * self._num_experts

    @property
    def layer_numbers(self) -> list[int]:
        """The model's numbers of the mixtures, which the store counts from 0."""
        return [layer.number for layer in self._layers]

    @property
    def rates(self) -> Rates | None:
        """Seconds of an expert on either side, of the first device; None without one."""
        return None if self.hot is None else self.hot.tiers[0].rates

    @property
    def num_ram_slots(self) -> int:
        return self.ram.residency.num_slots

    @property
    def num_device_slots(self) -> int:
        return 0 if self.hot is None else self.hot.num_slots

    @property
    def num_in_ram(self) -> int:
        """Experts held in RAM, those among them that the device holds too."""
        return self.ram.residency.num_resident

    @property
    def num_on_device(self) -> int:
        return int(self._on_device.sum())

    @property
    def nbytes(self) -> int:
        """Of the memory that experts take now, of RAM and devices together."""
        return self.slot_bytes * (self.num_ram_slots + self.num_device_slots)

    def source(self, layer: int) -> "StoredExperts":
        return StoredExperts(self, layer)

    def open(
        self,
        ram_slots: int,
        device_slots: Sequence[int] = (),
        progress: Callable[[int, int], None] | None = None,
        hot: HotSet | None = None,
    ) -> None:
        """Take memory for so many experts and read them in, each tier as far as it goes: what a
        device holds need not lie in RAM as well. device_slots: of each device. progress: bytes
        read, bytes to read. hot: which come first, as another store of this model had them.

        Raises MemoryLimitError where RAM has no room for `least_slots_for` a token, and what
        reading raises.
        """
        least = self._least_slots
        wanted = max(least, min(ram_slots, self.num_experts))
        found = self.ram.arena.resize(wanted)
        if found < least:
            raise MemoryLimitError(
                "memory for experts",
                expected=f"{least * self.slot_bytes / 2**20:.0f} MiB, {least} experts",
                found=f"{found * self.slot_bytes / 2**20:.0f} MiB",
                fix="Close other programs, or quantize to fewer bits.",
            )
        self.ram.residency.grow(found)
        if self.hot is not None:
            self.hot.open(device_slots)
        self._fill(progress, learn(hot, self.counts, self._ranking, self._per_token))
        self.is_complete = self.hot is None and self.ram.is_complete
        for tier in () if self.hot is None else self.hot.tiers:
            if tier.residency.num_slots:
                tier.rates = measure_rates(self._kernels, self._banks, self.ram, tier)

    def hot_set(self) -> HotSet:
        """What lies where now; between passes."""
        held = self.ram.residency.resident_keys
        return HotSet(self.counts.copy(), held, np.flatnonzero(self._on_device))

    def restore(self, hot: HotSet) -> None:
        """Between passes, hold again what was held then, as far as there is room. Raises what
        reading raises."""
        if self.is_complete:
            return
        learned = learn(hot, self.counts, self._ranking, self._per_token)
        if self.hot is not None:
            with self._losing_the_device():
                self.hot.settle()
                self.hot.make_room_for(learned.device.tolist())
        self.ram.make_room_for(learned.ram.tolist())
        self._fill(None, learned)

    def record_spans(self) -> list[Span]:
        """From now on what took time is added to the list that this returns."""
        spans: list[Span] = []
        self.ram.spans = self._accounting.spans = spans
        return spans

    def begin_pass(self, num_tokens: int) -> None:
        self._pass_begin = time.perf_counter()
        self._pass_tokens = num_tokens

    def end_pass(self) -> None:
        """After all layers, or after an error in one. What was copied into the device takes effect,
        and what is worth it is copied next."""
        seconds = time.perf_counter() - self._pass_begin
        self.usage.seconds += seconds
        self.usage.passes += 1
        self.usage.tokens += self._pass_tokens
        # Nothing is ranked where nothing has to go.
        self._accounting.tell(ranked=not self.is_complete)
        if not self.is_complete:
            self._ranking.tick(self._pass_tokens)
            if self._pass_tokens == 1:
                self._trial.measured(seconds)
        looks = self.usage.passes % PASSES_BETWEEN_LOOKS == 0
        if self.hot is not None:
            with self._losing_the_device():
                self.hot.finish()
                if looks:
                    self.hot.give_way()
                # A pass must find slots that no copy holds.
                self.hot.promote(self._least_slots)
        if looks:
            self._give_way()

    def mix(self, layer: int, x: Tensor, routing: Routing, residual: Tensor) -> None:
        """`ExpertSource` of a layer."""
        experts, counts = self._choices.add(layer, routing.experts)
        if self.is_complete:
            begin = time.perf_counter()
            self._kernels.mix_experts(x, routing, self._banks[layer], residual)
            self.usage.ram_seconds += time.perf_counter() - begin
            self._accounting.count_in_ram(len(experts))
            return
        with self._losing_the_device():
            self._compute.mix(layer, x, routing, residual, experts, counts)

    def complete(
        self, layer: int, x: Tensor, chosen: Tensor, residual: Tensor, outputs: Tensor
    ) -> None:
        """Beside a device that computes by itself what it holds: the outputs [T, k, hidden] of all
        other experts chosen int64 [T, k], which must not change until the pass is over. x: normed;
        residual: the layer's input, for a guess of what the next one needs."""
        experts, counts = self._choices.add(layer, chosen)
        uses = self._compute.find(layer, experts, counts)
        elsewhere = [use for use in uses if not use.on_device]
        self._accounting.count_on_device(len(uses) - len(elsewhere))
        self._compute.on_host(layer, x, chosen, elsewhere, outputs, residual)

    def prepare_for_cards(self) -> bool:
        """Before a token that devices compute by themselves: whether each of its layers needs
        `complete`, as reads go ahead. Else only those do of which an expert lies neither on a
        device nor in RAM; of all others it is enough to be told (`completed`)."""
        # What a device's stream calls must wait for nothing of the device's, as its driver may hold
        # a lock.
        if self.hot is not None:
            self.hot.await_downloads()
        self.ram.collect((), 0, block=False)
        return self._reads_ahead() and not self._all_in_memory

    def completed(self, results: Sequence[HostResult], now: float) -> None:
        """What `complete` learns of layers, of those that were computed without it since the last
        one. now: of time.perf_counter, when the results were told."""
        self._accounting.count_results(results, now)

    def host_mixtures(self, python: Callable[[int], None]) -> HostMixtures:
        """What computes layers without `complete`, by the store's kernels."""
        return self._kernels.host_mixtures(python)

    def places_of(self, layer: int) -> tuple[NativeExperts, NDArray[np.bool_]]:
        """Where a layer's experts lie, always in the same two tables: in RAM, where nothing makes
        room but for reads; and [experts] whether on a device, which changes between passes only."""
        return self._banks[layer], self._on_device[layer]

    def lose_device(self) -> None:
        """One failed, as somebody else found: the CPU has all experts from now on."""
        if self.hot is not None:
            self.hot.lose()

    def measure_reads(self) -> float:
        """Bytes a second of experts on their way from their files into slots, as many at once as
        the store reads; while nothing runs. The tiers stay as they are."""
        shape = len(self._layers), self._num_experts
        return measure_reads(self._files, self.slot_bytes, shape, self.options.read_threads)

    def stop(self) -> None:
        """Ends all threads. The store cannot be used afterwards; its files stay open."""
        if self.hot is not None:
            self.hot.stop()
        self.ram.stop()

    def close(self) -> None:
        """`stop`, and close the files."""
        self.stop()
        self._files.close()

    def _bank(self, layer: Layer) -> NativeExperts:
        """A layer's experts in RAM: none yet."""
        layout = self._kernels.expert_layout(layer.form)
        table = torch.zeros(layer.num_experts, dtype=torch.int64)
        return NativeExperts(layout, table, layer.form.hidden, self)

    def _tier(self, number: int, homes: Sequence[int], beneath: Beneath) -> DeviceTier:
        """Of the device with this number. It knows all layers, but holds experts of its own."""
        device, shape = self.devices[number], self.counts.shape
        for layer in self._layers:
            device.add_layer(layer.form, layer.num_experts)
        own = [place for place, home in enumerate(homes) if home == number]
        insert_cap = 0 if self.options.policy == "static" else INSERT_CAP
        hot = Residency(*shape, 0, self._ranking, insert_cap=insert_cap, layers=own)
        return DeviceTier(device, hot, self._on_device, beneath, self.ram, self.usage)

    @property
    def _all_in_memory(self) -> bool:
        """Whether no expert is to be found in its file alone."""
        if self.ram.num_reading:
            return False
        return bool((self._on_device | (self.ram.residency.slot_of != ABSENT)).all())

    def _reads_ahead(self) -> bool:
        wanted = self.options.read_ahead
        return self._trial.is_on if wanted is None else wanted

    def _fill(self, progress: Callable[[int, int], None] | None, hot: HotSet) -> None:
        """Devices first, by way of RAM, then RAM with what none of them holds; in each
        what is hot before all else."""
        total = self.slot_bytes * min(self.num_experts, self.num_ram_slots + self.num_device_slots)
        done = 0
        fills = [self.ram.fill(hot.ram.tolist()), self.ram.fill()]
        if self.hot is not None:
            fills = [self.hot.fill(hot.device.tolist()), self.hot.fill(), *fills]
        for nbytes in chain(*fills):
            done += nbytes
            if progress is not None:
                progress(min(done, total), total)

    @contextmanager
    def _losing_the_device(self) -> Iterator[None]:
        """Whoever asked gets the error; who asks next is served by the CPU alone."""
        try:
            yield
        except DeviceError:
            self.lose_device()
            raise

    def _give_way(self) -> None:
        """Where the system runs short of memory, slots shrink, not the run fails."""
        short = LOW_MEMORY - self.available_memory()
        if short <= 0:
            return
        slots = self.ram.residency.num_slots
        # At least a sixteenth: memory is given back in whole chunks of the arena.
        fewer = max(-(-short // self.slot_bytes), slots // 16)
        kept = max(slots - fewer, min(slots, self._least_slots))
        if kept < slots:
            if self.hot is not None:  # What is being copied may lie in a slot that goes.
                with self._losing_the_device():
                    self.hot.settle()
            self.ram.shrink(kept)
            self.is_complete = False


@dataclass(frozen=True)
class StoredExperts:
    """The routed experts of one layer (layers/moe.py: ExpertSource)."""

    store: ExpertStore
    layer: int

    def __call__(self, x: Tensor, routing: Routing, residual: Tensor) -> None:
        self.store.mix(self.layer, x, routing, residual)
