"""Which layers of a model go onto the cards of a machine that is planned for, and which of a
mixture's experts beside them."""

from dataclasses import dataclass, replace

from localr1.card.fit import Needs, Share, share_of_cards
from localr1.card.forecast import CardForecast, forecast_card
from localr1.cli.output import format_bytes
from localr1.cli.plan import Asked
from localr1.cli.plan_machine import CardBudget, Machine
from localr1.errors import MemoryLimitError
from localr1.experts.budget import parse_budget
from localr1.experts.footprint import Footprint, dense_bytes
from localr1.experts.options import ExpertOptions
from localr1.experts.placement import (
    DEVICE_PROGRAM_BYTES,
    CardUse,
    Placement,
    TierUse,
    largest_that_fits,
)
from localr1.quant.forecast import Forecast


def with_cards(
    placement: Placement, forecast: Forecast, machine: Machine, asked: Asked
) -> tuple[Placement, str]:
    """The placement in main memory with what `chat --device cuda` would put on the cards as well;
    and why they are not used, if they are not. Raises UsageError and MemoryLimitError where layers
    or cards were asked for that cannot be."""
    config = forecast.config
    if config.moe is not None or config.latent is not None:
        return placement, "which computes no experts that are not quantized alike"
    found = forecast_card(forecast.tensors, config, placement.context)
    needs = found.needs
    if not needs.layers:
        return placement, "which computes quantized layers alone"
    memory = [card.budget - DEVICE_PROGRAM_BYTES for card in machine.cards]
    names = [f"card {card.number}" for card in machine.cards]
    try:
        shares = share_of_cards(needs, memory, asked.gpu_layers, names)
    except MemoryLimitError:
        if asked.gpu_layers is not None or len(memory) > 1:
            raise
        short = needs.fixed + needs.layers[0] - memory[0]
        return placement, f"which lacks {format_bytes(short)}"
    uses = [_use(card, share, found) for card, share in zip(machine.cards, shares, strict=True)]
    return replace(placement, cards=tuple(uses)), ""


@dataclass(frozen=True)
class _Mixture:
    """Of a mixture on cards that were named. weights: bytes of each layer but its routed experts.
    head: with the last norm."""

    footprint: Footprint
    machine: Machine
    weights: list[int]
    head: int

    @property
    def memory(self) -> list[int]:
        return [card.budget - DEVICE_PROGRAM_BYTES for card in self.machine.cards]

    def cache(self, context: int) -> int:
        """Of a layer."""
        return self.footprint.cache(context) // len(self.weights)

    def needs(self, context: int) -> Needs:
        working = self.footprint.workspace(context, self.machine.threads)
        layers = [each + self.cache(context) for each in self.weights]
        return Needs(layers, self.head, working.forward + working.logits, len(layers))

    def shares(self, context: int) -> tuple[Share, ...]:
        names = [f"card {card.number}" for card in self.machine.cards]
        return share_of_cards(self.needs(context), self.memory, None, names)

    def fits(self, context: int) -> bool:
        try:
            return self.shares(context)[-1].has_head
        except MemoryLimitError:
            return False

    def use(self, number: int, share: Share, context: int, limit: str | None) -> CardUse:
        """limit: as `--vram` has it, of this card."""
        card, footprint = self.machine.cards[number], self.footprint
        moe = footprint.config.moe
        assert moe is not None
        mixtures = sum(share.first <= layer < share.last for layer in moe.layers)
        tier = TierUse(
            budget=card.budget,
            program=DEVICE_PROGRAM_BYTES,
            weights=sum(self.weights[share.first : share.last]) + share.has_head * self.head,
            cache=self.cache(context) * share.num_layers,
            workspace=self.needs(context).fixed,
            slots=0,
            slot_bytes=footprint.expert,
        )
        room = tier.free
        if limit is not None:
            room = parse_budget(limit, "--vram", whole=footprint.experts, available=room)
        slots = min(room // footprint.expert, mixtures * moe.router.num_experts)
        filled = replace(tier, slots=slots)
        return CardUse(card.number, share.num_layers, share.has_head, filled, mixtures)


def with_mixture_on_cards(
    placement: Placement, forecast: Forecast, machine: Machine, asked: Asked
) -> tuple[Placement, str]:
    """The placement in main memory with the layers of a mixture on cards that were named, and the
    routed experts of each card's layers in what memory that leaves; and why they are not used, if
    they are not: as of one card, that is where they have not room for all layers. Raises UsageError
    and MemoryLimitError as `with_cards`, and the latter where experts were to lie there."""
    footprint = placement.footprint
    weights, head = dense_bytes(forecast.tensors, forecast.config, for_card=True)
    pages = footprint.rounding // len(weights)
    mixture = _Mixture(footprint, machine, [each + pages for each in weights], head)
    shares = mixture.shares(placement.context)
    if not shares[-1].has_head:
        needs = mixture.needs(placement.context)
        taken = len(shares) * needs.fixed + sum(needs.layers) + head
        # Where all cards together have enough, no cut between layers suits each.
        lacking = format_bytes(max(taken - sum(mixture.memory), max(needs.layers)))
        if asked.vram is None:
            return placement, f"which lacks {lacking}"
        raise MemoryLimitError(
            "--vram",
            expected="cards with room for all layers beside experts",
            found=f"{lacking} less than that",
        )
    options = ExpertOptions(vram=asked.vram, devices=asked.devices)
    uses = tuple(
        mixture.use(number, share, placement.context, options.vram_of(number))
        for number, share in enumerate(shares)
    )
    held = placement.ram.slots + sum(use.tier.slots for use in uses)
    found = replace(
        placement,
        cards=uses,
        experts_on_disk=max(footprint.num_experts - held, 0),
        largest_context=largest_that_fits(mixture.fits, placement.largest_context),
    )
    return found, ""


def _use(card: CardBudget, share: Share, forecast: CardForecast) -> CardUse:
    needs = forecast.needs
    cache = share.num_layers * forecast.cache
    weights = sum(needs.layers[share.first : share.last]) - cache
    workspace = needs.fixed
    if share.has_head:
        assert needs.head is not None
        weights += needs.head - forecast.logits
        workspace += forecast.logits
    tier = TierUse(card.budget, DEVICE_PROGRAM_BYTES, weights, cache, workspace, 0, 0)
    return CardUse(card.number, share.num_layers, share.has_head, tier)
