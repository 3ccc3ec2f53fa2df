"""What of a model lies where: graphics memory, main memory, disk. Pure: never imports torch.

Dense weights, cache and workspace must lie in main memory, and in graphics memory where a mixture
uses it; routed experts take what that leaves, then main memory, and the rest stays in its files.
`localr1 plan` prints a placement before anything is downloaded; load.py makes the same one before
it reads a weight.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from localr1.experts.footprint import Footprint

DEFAULT_CONTEXT = 8192
"""Tokens, where the model was made for more and nobody asked: a bigger window costs memory only as
it fills, but then it does."""
LEAST_CONTEXT = 512
"""Tokens that must fit where nobody asked: a chunk of a prompt."""

PROGRAM_BYTES = 300 << 20
"""Python with torch and localr1, its threads started: benchmarks/plan_memory.py measures it. torch
loads the CUDA bindings where they are installed, which is 11 MiB of it."""
TOKENIZER_BYTES = 1600
"""A token of the vocabulary, while the tokenizer is built; the same script."""
DEVICE_PROGRAM_BYTES = 512 << 20
"""A CUDA context with its modules loaded. Not measured yet."""
CARD_MARGIN = 512 << 20
"""Of a card's free memory, what is left to others and to what computing takes beside a model."""
READ_THREADS = 4
"""Experts read at once: what an NVMe drive needs to be busy, of some megabytes each."""
PAGE = 4096
MARGIN = 1 / 32
LEAST_MARGIN = 256 << 20
"""What is left to everything else: this share of the memory that is free, and at least so much."""


@dataclass(frozen=True)
class Memory:
    """Bytes this process may take: ram with everything it has taken already, vram None where there
    is no device."""

    ram: int
    vram: int | None = None


@dataclass(frozen=True)
class Budgets:
    """The most bytes of routed experts that each memory may hold (`--vram`, `--ram`); None: what
    it has room for."""

    ram: int | None = None
    vram: int | None = None


NO_BUDGETS = Budgets()


@dataclass(frozen=True)
class TierUse:
    """One memory, in bytes. budget: of it. program: what runs, without the model. weights: that
    must lie here. slots: experts there is room for, of slot_bytes each."""

    budget: int
    program: int
    weights: int
    cache: int
    workspace: int
    slots: int
    slot_bytes: int

    @property
    def experts(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def needed(self) -> int:
        """What is taken whatever else is, experts aside."""
        return self.program + self.weights + self.cache + self.workspace

    @property
    def free(self) -> int:
        """Negative where the budget does not do."""
        return self.budget - self.needed - self.experts


@dataclass(frozen=True)
class CardUse:
    """number: the card's. tier: its memory, of which weights are those of num_layers layers and,
    where it has_head, of the head. num_mixtures: of these layers, whose routed experts its slots
    may hold."""

    number: int
    num_layers: int
    has_head: bool
    tier: TierUse
    num_mixtures: int = 0


@dataclass(frozen=True)
class Placement:
    """context: tokens of the window. vram: of a mixture, None without a device. experts_on_disk:
    that no slot holds. short: memory -> bytes it lacks, {} where all fits. largest_context: tokens
    of the longest window that fits, 0 where none does. cards: those that compute layers, of a dense
    model or, in the place of vram, of a mixture; main memory holds them all the same."""

    footprint: Footprint
    context: int
    vram: TierUse | None
    ram: TierUse
    experts_on_disk: int
    short: Mapping[str, int]
    largest_context: int
    cards: tuple[CardUse, ...] = ()

    @property
    def layers_on_cards(self) -> int:
        return sum(card.num_layers for card in self.cards)

    @property
    def fits(self) -> bool:
        return not self.short

    @property
    def experts_in_vram(self) -> int:
        on_cards = sum(card.tier.slots for card in self.cards)
        return on_cards if self.vram is None else self.vram.slots

    @property
    def is_on_gpu(self) -> bool:
        """Whether a GPU computes anything."""
        return self.vram is not None or bool(self.cards)

    @property
    def experts_in_ram(self) -> int:
        """That lie in main memory and not in graphics memory."""
        return self.footprint.num_experts - self.experts_in_vram - self.experts_on_disk


def default_budget(free: int, held: int = 0) -> int:
    """What of the free memory may be taken, beside what this process holds already."""
    return max(held + free - max(int(free * MARGIN), LEAST_MARGIN), 0)


def least_slots(footprint: Footprint) -> int:
    """Experts that main memory must have room for."""
    return least_slots_for(footprint.experts_per_token, footprint.num_experts)


def least_slots_for(experts_per_token: int, num_experts: int) -> int:
    """Those of one token in one layer, and as many being read for the next. num_experts: of all
    layers."""
    return min(2 * experts_per_token, num_experts)


def reading_bytes(footprint: Footprint) -> int:
    """Of the threads that read experts: one expert each, and what rounding to pages adds."""
    return READ_THREADS * (footprint.expert + 2 * PAGE) if footprint.num_experts else 0


def program_bytes(footprint: Footprint) -> int:
    """Main memory that everything but the model takes, its tokenizer and the threads that read
    experts included."""
    return PROGRAM_BYTES + TOKENIZER_BYTES * footprint.config.vocab_size + reading_bytes(footprint)


def place(
    footprint: Footprint,
    memory: Memory,
    context: int | None = None,
    *,
    budgets: Budgets = NO_BUDGETS,
    threads: int = 1,
) -> Placement:
    """context: tokens of the window; None for the model's own, at most DEFAULT_CONTEXT, less where
    memory is short. Experts give way to a longer context, down to `least_slots`."""
    largest = _largest_context(footprint, memory, threads)
    if context is None:
        longest = footprint.config.max_positions
        context = max(min(longest, DEFAULT_CONTEXT, largest), min(LEAST_CONTEXT, longest))
    vram, ram = _tiers(footprint, memory, budgets, context, threads)
    held = ram.slots
    if ram.slots < footprint.num_experts and vram is not None:
        held += vram.slots  # What is in graphics memory needs no second place.
    short = {
        name: -tier.free
        for name, tier in (("vram", vram), ("ram", ram))
        if tier is not None and tier.free < 0
    }
    return Placement(
        footprint=footprint,
        context=context,
        vram=vram,
        ram=ram,
        experts_on_disk=max(footprint.num_experts - held, 0),
        short=short,
        largest_context=largest,
    )


def _tiers(
    footprint: Footprint, memory: Memory, budgets: Budgets, context: int, threads: int
) -> tuple[TierUse | None, TierUse]:
    cache, workspace = footprint.cache(context), footprint.workspace(context, threads)
    # While weights are read there is neither cache nor workspace yet.
    working = max(workspace.forward + workspace.logits, footprint.loading - cache)
    program, least = program_bytes(footprint) + workspace.text, least_slots(footprint)
    weights = footprint.dense + footprint.rounding
    # Main memory holds all but experts whatever a device computes: one that fails costs a request.
    host = TierUse(
        memory.ram, program, weights + footprint.embedding, cache, working, 0, footprint.expert
    )
    host = _with_slots(host, footprint.num_experts, least, budgets.ram)
    if memory.vram is None:
        return None, host
    # The token table stays there alone: a token's row is looked up.
    device = TierUse(
        memory.vram, DEVICE_PROGRAM_BYTES, weights, cache, working, 0, footprint.expert
    )
    return _with_slots(device, footprint.num_experts, 0, budgets.vram), host


def _with_slots(tier: TierUse, num_experts: int, least: int, budget: int | None) -> TierUse:
    """The tier with as many slots as it has room for and may have."""
    if not num_experts:
        return tier
    room = tier.free if budget is None else min(tier.free, budget)
    return replace(tier, slots=max(min(room // tier.slot_bytes, num_experts), least))


def _largest_context(footprint: Footprint, memory: Memory, threads: int) -> int:
    def fits(context: int) -> bool:
        tiers = _tiers(footprint, memory, NO_BUDGETS, context, threads)
        return all(tier.free >= 0 for tier in tiers if tier is not None)

    return largest_that_fits(fits, footprint.config.max_positions)


def largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """A window in tokens, at most so many; 0 where none does. By halves: what it takes grows with
    it."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
