"""What a machine would make of a routing trace: where each token finds its experts, what is moved,
how long it takes. Pure numpy, no torch.

The tiers are those of the expert store (store.py) with the same policies: a device with slots, RAM
above files, and copies into the device that take effect between passes once the link had the time
for them. A decoded token takes

    all other weights / their bandwidth, and for each layer
    max(device's experts / its bandwidth, CPU's experts / its bandwidth, waits for the disk counted)
    and a round trip where the CPU has a part in what a GPU computes.

Left out: attention over the context, reads ahead of the router, copies and CPU sharing RAM's
bandwidth, and the time of prefill, whose passes only fill the tiers.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from localr1.errors import UsageError
from localr1.experts.beneath import Beneath
from localr1.experts.hardware import HardwareProfile
from localr1.experts.placement import least_slots_for
from localr1.experts.policy import RANKINGS, Belady, Ranking, make_ranking
from localr1.experts.residency import ABSENT, Promotion, Residency

if TYPE_CHECKING:
    from localr1.experts.trace import Trace
    from localr1.models.config import ModelConfig

ORACLE: Final = "belady"
POLICIES: Final = (*RANKINGS, ORACLE)
READS: Final = 4
"""At once, sharing the disk's bandwidth."""
CHUNK: Final = 512
"""Tokens of a prompt in one pass."""
INSERT_CAP: Final = 8
"""Promotions in flight at once."""
BOUNDS: Final = ("compute", "RAM", "device", "disk")
GIGA: Final = 1e9


@dataclass(frozen=True)
class MixtureSizes:
    """Bytes: of an expert, and of all other weights that a token reads."""

    expert_bytes: int
    dense_bytes: int


def mixture_sizes(config: "ModelConfig", bits_per_weight: float) -> MixtureSizes:
    """All weights at the same bits. Raises UsageError for a model without routed experts."""
    moe = config.moe
    if moe is None:
        raise UsageError(
            "--model", expected="a mixture of experts", found=f"{config.architecture}, dense"
        )
    expert = 3 * config.hidden_size * moe.intermediate_size
    routed = len(moe.layers) * moe.router.experts_per_token * expert
    # Of the token table a token reads one row; tied, it is the head, which is read whole.
    table = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    dense = config.active_parameter_count - routed - table
    return MixtureSizes(int(expert * bits_per_weight / 8), int(dense * bits_per_weight / 8))


@dataclass(frozen=True)
class Budgets:
    """Bytes for experts on the device and in RAM."""

    vram: int
    ram: int


@dataclass
class Prediction:
    """Of the decoded tokens of a trace. uses: experts chosen, of which device_uses, ram_uses and
    reads found on the device, in RAM and in files; spared: of those in RAM, how many lay on the
    device as well, which had enough to do. promotions, demotions: experts moved into the device,
    and back into RAM. *_bytes: read where they were computed, copied
    over the link, read from files. seconds: of which *_seconds on the CPU's experts, waiting for
    the device, waiting for the disk; the rest is the other weights and round trips."""

    policy: str
    tokens: int = 0
    device_uses: int = 0
    ram_uses: int = 0
    reads: int = 0
    spared: int = 0
    promotions: int = 0
    demotions: int = 0
    device_bytes: int = 0
    ram_bytes: int = 0
    link_bytes: int = 0
    disk_bytes: int = 0
    seconds: float = 0.0
    ram_seconds: float = 0.0
    device_seconds: float = 0.0
    disk_seconds: float = 0.0

    @property
    def uses(self) -> int:
        return self.device_uses + self.ram_uses + self.reads

    @property
    def hit_rate(self) -> float:
        """Share of uses that found the expert in the fastest tier there is below the files, as
        `ExpertUsage.hit_rate`."""
        on_device = self.device_uses + self.spared
        return (on_device or self.ram_uses) / self.uses if self.uses else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def bound(self) -> str:
        """What most of the time went into, one of BOUNDS."""
        parts = (self.ram_seconds, self.device_seconds, self.disk_seconds)
        return max(zip((self.seconds - sum(parts), *parts), BOUNDS, strict=True))[1]


def check_policy(name: str) -> str:
    """The name. Raises UsageError for one that is not of POLICIES."""
    if name not in POLICIES:
        raise UsageError(
            "--policy", expected=f"one of {', '.join(POLICIES)}", found=repr(name[:40])
        )
    return name


def simulate(
    trace: "Trace",
    sizes: MixtureSizes,
    hardware: HardwareProfile,
    budgets: Budgets,
    policy: str,
) -> Prediction:
    """policy: one of POLICIES. Raises UsageError for another, for a trace that decodes nothing and
    for a budget of RAM too small to run."""
    check_policy(policy)
    if not trace.sequences[:, 1].sum():
        raise UsageError(
            "the trace",
            expected="generated tokens",
            found="prompts only",
            fix="Record it with --max-tokens of at least 2.",
        )
    tiers = _Tiers(trace, sizes, hardware, budgets, policy)
    begin = 0
    for prompt, generated in trace.sequences.tolist():
        for first in range(begin, begin + prompt, CHUNK):
            tiers.prefill(first, min(first + CHUNK, begin + prompt))
        for token in range(begin + prompt, begin + prompt + generated):
            tiers.decode(token)
        begin += prompt + generated
    return tiers.found


@dataclass
class _Link:
    """Copies one after another. Times are the simulated clock's."""

    seconds_each: float
    free_at: float = 0.0
    copies: list[tuple[float, Promotion]] = field(default_factory=list)

    def occupy(self, now: float) -> None:
        """For one copy more."""
        self.free_at = max(self.free_at, now) + self.seconds_each

    def begin(self, promotion: Promotion, now: float) -> None:
        self.occupy(now)
        self.copies.append((self.free_at, promotion))

    def finished(self, now: float) -> list[Promotion]:
        done = [promotion for end, promotion in self.copies if end <= now]
        self.copies = [copy for copy in self.copies if copy[0] > now]
        return done


class _Tiers:
    """The state of the tiers while a trace goes through them, and the clock."""

    def __init__(
        self,
        trace: "Trace",
        sizes: MixtureSizes,
        hardware: HardwareProfile,
        budgets: Budgets,
        policy: str,
    ) -> None:
        shape = trace.experts.shape[1], trace.num_experts
        total = shape[0] * shape[1]
        self.found = Prediction(policy)
        self._choices = trace.experts.astype(np.int64)
        self._layers = np.arange(shape[0])[:, None]
        self._sizes, self._hardware = sizes, hardware
        is_oracle = policy == ORACLE
        self._ranking: Ranking = Belady(trace) if is_oracle else make_ranking(policy, *shape)
        device_slots = min(total, budgets.vram // sizes.expert_bytes) if hardware.has_gpu else 0
        self._device = Residency(
            *shape,
            device_slots,
            self._ranking,
            insert_cap=0 if policy == "static" else INSERT_CAP,
            layer_floor=0.0 if is_oracle else None,
            exact=is_oracle,
        )
        self._on_device = np.zeros(shape, bool)
        self._beneath = Beneath(self._ranking, self._on_device)
        # What a token needs of a layer, and as much again for copies under way.
        self._least = least_slots_for(trace.experts_per_token, total)
        ram_slots = min(total, budgets.ram // sizes.expert_bytes)
        if ram_slots < self._least:
            raise UsageError(
                "--ram",
                expected=f"at least {self._least * sizes.expert_bytes:,} bytes, {self._least} "
                "experts",
                found=f"{budgets.ram:,} bytes",
            )
        self._ram = Residency(
            *shape,
            ram_slots,
            self._beneath,
            insert_cap=0,
            layer_floor=0.0 if is_oracle else None,
            exact=is_oracle,
        )
        for promotion in self._device.warm_start():
            self._arrive(promotion)
        for promotion in self._ram.warm_start():
            self._ram.complete(promotion)
        expert = sizes.expert_bytes / GIGA
        self._cpu_seconds = expert / hardware.cpu
        self._disk_seconds = expert / hardware.disk
        self._device_seconds = self._round_trip = 0.0
        if hardware.has_gpu:
            self._device_seconds = expert / hardware.gpu(sizes.expert_bytes)
            self._round_trip = hardware.round_trip_us * 1e-6
        self._link = _Link(expert / hardware.pcie if hardware.has_gpu else 0.0)
        self._clock = 0.0
        self._pinned = 0

    def prefill(self, begin: int, end: int) -> None:
        """A chunk of a prompt in one pass. What it reads and promotes is there at its end."""
        for layer in range(len(self._layers)):
            experts, counts = np.unique(self._choices[begin:end, layer], return_counts=True)
            self._ranking.observe(
                layer, experts, None if end - begin == 1 else counts.astype(np.float64)
            )
            absent = ~self._on_device[layer, experts]
            absent &= self._ram.slot_of[layer, experts] == ABSENT
            for expert in experts[absent].tolist():
                self._ram.demand(layer, expert)
        self._ranking.tick(end - begin)
        self._clock = max(self._clock, self._link.free_at)
        self._end_pass()
        self._clock = max(self._clock, self._link.free_at)

    def decode(self, token: int) -> None:
        choices = self._choices[token]
        on_device = self._on_device[self._layers, choices]
        in_ram = self._ram.slot_of[self._layers, choices] != ABSENT
        is_lacking = not (on_device | in_ram).all()
        for layer, experts in enumerate(choices):
            self._ranking.observe(layer, experts)
            if is_lacking:
                # What other layers read may have taken its place meanwhile.
                in_ram[layer] = self._ram.slot_of[layer, experts] != ABSENT
                absent = experts[~(on_device[layer] | in_ram[layer])]
                self._read(layer, experts[in_ram[layer]].tolist(), absent.tolist())
        places = np.stack(
            [on_device & ~in_ram, on_device & in_ram, in_ram & ~on_device, ~(on_device | in_ram)]
        )
        seconds = self._sizes.dense_bytes / GIGA / self._hardware.dense
        for only_device, both, only_ram, files in places.sum(axis=2).T.tolist():
            seconds += self._layer(only_device, both, only_ram, files)
        self._clock += seconds
        self.found.seconds += seconds
        self.found.tokens += 1
        self._ranking.tick(1)
        self._end_pass()

    def _read(self, layer: int, present: list[int], absent: list[int]) -> None:
        for expert in present:
            self._ram.pin(layer, expert)
        for expert in absent:
            self._ram.demand(layer, expert)
            self._ram.pin(layer, expert)
        for expert in (*present, *absent):
            self._ram.unpin(layer, expert)

    def _layer(self, only_device: int, both: int, only_ram: int, files: int) -> float:
        """Seconds of a layer of a decoded token, by how many of its experts lie where; counted."""
        found, each, nbytes = self.found, self._cpu_seconds, self._sizes.expert_bytes
        # An expert in both is computed where the pass ends sooner, if that is no matter on the
        # device (schedule.py).
        spared = min(
            range(both + 1),
            key=lambda count: max(
                (only_device + both - count) * self._device_seconds,
                (only_ram + files + count) * each,
            ),
        )
        on_device, here = only_device + both - spared, only_ram + spared
        busy, waited = here * each, 0.0
        for first in range(0, files, READS):
            arriving = min(READS, files - first)
            arrival = (first + arriving) * self._disk_seconds
            waited += max(arrival - busy, 0.0)
            busy = max(arrival, busy) + arriving * each
        device = on_device * self._device_seconds
        found.device_uses += on_device
        found.ram_uses += here
        found.reads += files
        found.spared += spared
        found.device_bytes += on_device * nbytes
        found.ram_bytes += (here + files) * nbytes
        found.disk_bytes += files * nbytes
        found.ram_seconds += (here + files) * each
        found.disk_seconds += waited
        found.device_seconds += max(device - busy, 0.0)
        return max(device, busy) + (self._round_trip if here + files else 0.0)

    def _end_pass(self) -> None:
        """Copies that are done take effect, and others begin, as in ExpertStore.end_pass."""
        for promotion in self._link.finished(self._clock):
            self._ram.unpin(promotion.layer, promotion.expert)
            self._pinned -= 1
            self._arrive(promotion)
            self.found.promotions += 1
            self.found.link_bytes += self._sizes.expert_bytes
        promotions = self._device.promotions()
        for promotion in promotions:
            if promotion.evicted_key is not None:
                self._on_device.reshape(-1)[promotion.evicted_key] = False
                self._beneath.moved()
        begun: list[Promotion] = []
        for promotion in promotions:
            is_short = self._ram.num_slots - self._pinned <= self._least
            if is_short or not self._ram.is_resident(promotion.layer, promotion.expert):
                self._device.cancel(promotion)
                continue
            self._ram.pin(promotion.layer, promotion.expert)
            self._pinned += 1
            begun.append(promotion)
        self._demote([each.evicted_key for each in begun if each.evicted_key is not None])
        for promotion in begun:
            self._link.begin(promotion, self._clock)

    def _demote(self, keys: list[int]) -> None:
        """What the device dropped is copied back where RAM holds something worth less. It is there
        for the next token."""
        room = self._ram.num_slots - self._pinned - self._least
        scores = self._beneath.score(np.array(keys, np.int64)).tolist()
        for key, score in zip(keys, scores, strict=True):
            layer, expert = divmod(key, self._device.num_experts)
            if room <= 0 or self._ram.is_resident(layer, expert):
                continue
            if self._ram.has_room_for(layer, score):
                self._ram.demand(layer, expert)
                self._link.occupy(self._clock)
                self.found.demotions += 1
                self.found.link_bytes += self._sizes.expert_bytes
                room -= 1

    def _arrive(self, promotion: Promotion) -> None:
        self._device.complete(promotion)
        self._on_device[promotion.layer, promotion.expert] = True
        self._beneath.moved()
